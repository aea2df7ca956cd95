"""The clocks of the runs that must agree."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.adapters.sandbox.inside.clock import SECONDS_AHEAD

YEAR_2100 = 4_102_444_800


def fields(name: str) -> Callable[[datetime], int]:
    return lambda moment: int(getattr(moment, name))


@pytest.mark.parametrize(
    "look",
    [
        *(pytest.param(fields(name), id=name) for name in ("year", "hour", "minute", "second")),
        pytest.param(datetime.weekday, id="day of the week"),
        pytest.param(lambda moment: moment.toordinal() % 2, id="parity of the day"),
        pytest.param(lambda moment: moment.hour // 12, id="half of the day"),
        pytest.param(lambda moment: moment.hour % 2, id="parity of the hour"),
        pytest.param(lambda moment: moment.minute % 2, id="parity of the minute"),
        pytest.param(lambda moment: moment.second % 2, id="parity of the second"),
    ],
)
@given(now=st.integers(0, YEAR_2100))
def test_at_every_moment_some_run_sees_another_value(look: Callable[[datetime], int], now: int) -> None:
    assert len({look(datetime.fromtimestamp(now + ahead, UTC)) for ahead in SECONDS_AHEAD}) > 1
