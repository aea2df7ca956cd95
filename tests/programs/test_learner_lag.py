"""The bound that the learner announces, and the one that holds for a batch."""

from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.lag_control import Measurement
from azr_async.config import FlowConfig
from azr_async.programs.learner_lag import LagBound

STEP = Measurement(trained_tokens=100.0, ess=1.0, seconds=1.0)


def test_a_fixed_bound_is_the_bound_of_every_batch() -> None:
    bound = LagBound(FlowConfig(max_lag=3), {})
    for version in range(6):
        assert bound.announced(version) == 3
        bound.measured(STEP)
        assert bound.metrics(version) == {"bound": 3}
    assert bound.numbers() == {}


@given(st.lists(st.floats(0.1, 10.0), min_size=20, max_size=80), st.data())
def test_no_sample_is_older_than_what_its_batch_is_said_to_have(seconds: list[float], data: st.DataObject) -> None:
    """Whatever the search does: a sample that was admitted under version u is trained at u + the bound of u at most."""
    bound = LagBound(FlowConfig(max_lag="auto", lag_floor=0, lag_ceiling=6, lag_decision_steps=2), {})
    announced: list[int] = []
    for version, took in enumerate(seconds):
        announced.append(bound.announced(version))
        assert 0 <= announced[version] <= 6
        possible = [admitted for admitted in range(version + 1) if admitted + announced[admitted] >= version]
        oldest = data.draw(st.sampled_from(possible))
        assert version - oldest <= bound.of_batch(version) <= 6
        bound.measured(Measurement(trained_tokens=100.0, ess=0.9, seconds=took))


def test_a_decision_is_told_once_with_its_reason() -> None:
    bound = LagBound(FlowConfig(max_lag="auto", lag_decision_steps=2), {})
    told = []
    for version in range(12):
        bound.announced(version)
        bound.measured(STEP)
        told.append(bound.metrics(version)["decision"])
    assert next(reason for reason in told if reason).startswith("tries 3: 2 gives 100")
    bound.announced(12)
    assert bound.metrics(12)["decision"] is None


def test_a_resumed_run_goes_on_with_the_bound_that_it_had() -> None:
    flow = FlowConfig(max_lag="auto", lag_decision_steps=2)
    bound = LagBound(flow, {})
    for version in range(6):
        bound.announced(version)
        bound.measured(STEP)
    again = LagBound(flow, {"wall_seconds": 3.0} | bound.numbers())
    assert (again.now, bound.now) == (3, 3)
    assert LagBound(flow, {"wall_seconds": 3.0}).now == 2
