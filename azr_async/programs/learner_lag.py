"""The staleness bound as the learner announces it: fixed, or searched while the run goes on (`flow.max_lag: auto`)."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from azr_async.algorithm.lag_control import Decision, LagSettings, LagState, Measurement, observed
from azr_async.config import FlowConfig

_PREFIX: Final = "lag."

log = logging.getLogger(__name__)


class LagBound:
    """Which bound holds for what is admitted now, and which for the batch at hand.

    The learner decides, for it knows what a step took and what its data was worth; self-play hears of it with the
    weights (`WeightsReady.max_lag`), so that all that is admitted under one version has one bound.
    """

    def __init__(self, flow: FlowConfig, numbers: Mapping[str, float]) -> None:
        """`numbers` are those of the checkpoint that the run goes on from; others than of the search may be there."""
        self._settings: LagSettings | None = None
        self._fixed = flow.lag_limit
        if flow.max_lag == "auto":
            self._settings = LagSettings(
                floor=flow.lag_floor,
                ceiling=flow.lag_ceiling,
                steps=flow.lag_decision_steps,
                least_gain=flow.lag_least_gain,
            )
            known = {name.removeprefix(_PREFIX): x for name, x in numbers.items() if name.startswith(_PREFIX)}
            self._state = LagState.restored(known, self._settings)
        self._by_version: dict[int, int] = {}
        self._decision: Decision | None = None

    @property
    def now(self) -> int:
        """For what is admitted from now on."""
        return self._fixed if self._settings is None else self._state.bound

    def announced(self, version: int) -> int:
        """Self-play is told of it with the weights of `version`; returns the bound."""
        limit = version - self._fixed
        self._by_version = {admitted: bound for admitted, bound in self._by_version.items() if admitted >= limit}
        return self._by_version.setdefault(version, self.now)

    def of_batch(self, version: int) -> int:
        """The bound of a batch that weights of `version` train on: the largest of those that its samples may have.

        One admitted long ago may be there as well: its age counts from its first token.
        """
        return max((bound for admitted, bound in self._by_version.items() if admitted <= version), default=self.now)

    def measured(self, measurement: Measurement) -> None:
        """A step was trained; it may lead to another bound from the next version on."""
        if self._settings is not None:
            self._state, self._decision = observed(self._state, measurement, self._settings)
            if self._decision is not None:
                log.info("staleness bound: %s", self._decision.reason)

    def metrics(self, version: int) -> dict[str, Any]:
        """Of `lag` in metrics.jsonl, for the batch of `version`."""
        told: dict[str, Any] = {"bound": self.of_batch(version)}
        if self._settings is not None:
            told |= {"next_bound": self.now, "decision": self._decision.reason if self._decision else None}
            self._decision = None
        return told

    def numbers(self) -> dict[str, float]:
        """For a checkpoint."""
        if self._settings is None:
            return {}
        return {f"{_PREFIX}{name}": number for name, number in self._state.numbers().items()}
