"""Another time of day for all but the first of the runs that must agree: what looks at it answers differently."""

import sys
import time
from typing import Final

_DAY: Final = 86_400
SECONDS_AHEAD: Final = (
    0,
    1009 * _DAY + 12 * 3600,  # other half of the day, other day of the week, other year
    2023 * _DAY + 7 * 3600,  # other parity of the hour, at every minute: whole hours carry nothing
    2744 * _DAY + 17 * 3600 + 31 * 60,  # other parity of the minute
    3391 * _DAY + 5 * 3600 + 16 * 60 + 1,  # other parity of the second
)
"""By flavour. Whatever the time is, one of them gives another value to each field of a date, and another parity to the
hour, the minute and the second; days of a month or a week may agree in parity."""


def shift_clock(flavour: int) -> None:
    """Move what `time` and `datetime` call now. Before `datetime` is imported: its C version cannot be moved."""
    seconds_ahead = SECONDS_AHEAD[flavour % len(SECONDS_AHEAD)]
    sys.modules["_datetime"] = None  # type: ignore[assignment]  # the pure Python version asks `time.time`
    now, gmtime, localtime, strftime = time.time, time.gmtime, time.localtime, time.strftime

    now_of_clock, now_of_clock_ns = time.clock_gettime, time.clock_gettime_ns

    def shifted_time() -> float:
        return now() + seconds_ahead

    def shifted_time_ns() -> int:
        return int(shifted_time() * 1e9)

    def shifted_clock_gettime(clock: int) -> float:
        return now_of_clock(clock) + seconds_ahead

    def shifted_clock_gettime_ns(clock: int) -> int:
        return now_of_clock_ns(clock) + seconds_ahead * 10**9

    def shifted_gmtime(seconds: float | None = None) -> time.struct_time:
        return gmtime(shifted_time() if seconds is None else seconds)

    def shifted_localtime(seconds: float | None = None) -> time.struct_time:
        return localtime(shifted_time() if seconds is None else seconds)

    def shifted_strftime(form: str, moment: time.struct_time | None = None) -> str:
        return strftime(form, shifted_localtime() if moment is None else moment)

    def shifted_asctime(moment: time.struct_time | None = None) -> str:
        return shifted_strftime("%a %b %e %H:%M:%S %Y", moment)

    def shifted_ctime(seconds: float | None = None) -> str:
        return shifted_asctime(shifted_localtime(seconds))

    time.time, time.time_ns = shifted_time, shifted_time_ns
    time.clock_gettime, time.clock_gettime_ns = shifted_clock_gettime, shifted_clock_gettime_ns
    time.gmtime, time.localtime = shifted_gmtime, shifted_localtime  # type: ignore[assignment]
    time.strftime, time.asctime, time.ctime = shifted_strftime, shifted_asctime, shifted_ctime  # type: ignore[assignment]
