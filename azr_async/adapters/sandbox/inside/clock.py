"""Another time of day for the second of two runs, so that a program that looks at it answers differently."""

import sys
import time
from typing import Final

SHIFT_SECONDS: Final = 123_456_789.0
"""Nearly four years: no field of a date stays the same but by chance."""


def shift_clock() -> None:
    """Move what `time` and `datetime` call now. Before `datetime` is imported: its C version cannot be moved."""
    sys.modules["_datetime"] = None  # type: ignore[assignment]  # the pure Python version asks `time.time`
    now, gmtime, localtime, strftime = time.time, time.gmtime, time.localtime, time.strftime

    def shifted_time() -> float:
        return now() + SHIFT_SECONDS

    def shifted_time_ns() -> int:
        return int(shifted_time() * 1e9)

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
    time.gmtime, time.localtime = shifted_gmtime, shifted_localtime  # type: ignore[assignment]
    time.strftime, time.asctime, time.ctime = shifted_strftime, shifted_asctime, shifted_ctime  # type: ignore[assignment]
