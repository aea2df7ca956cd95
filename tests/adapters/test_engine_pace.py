"""What the engine tells of its speed."""

from itertools import count

from azr_async.adapters.engines.embedded.pace import Pace


def test_sums_are_those_of_lines_through_counts_and_seconds() -> None:
    ticks = count(0.0, 0.5)
    pace = Pace(lambda: next(ticks))
    for rows in (3, 5):
        with pace.step(rows):
            pass
    with pace.prefill(2, 30):
        pass
    pace.installed(0.25)
    pace.installed(0.5)
    assert pace.numbers() == {
        "pace.steps": 2.0,
        "pace.rows": 8.0,
        "pace.rows_squared": 34.0,
        "pace.step_seconds": 1.0,
        "pace.rows_seconds": 4.0,
        "pace.prefills": 1.0,
        "pace.prompts": 2.0,
        "pace.prompts_squared": 4.0,
        "pace.prompt_tokens": 30.0,
        "pace.prefill_seconds": 0.5,
        "pace.prompts_seconds": 1.0,
        "pace.installs": 2.0,
        "pace.install_seconds": 0.75,
    }
