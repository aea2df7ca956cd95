"""Files finished samples into the flow, gives dropped prompts back to the library, and counts for the metrics."""

import time
from collections.abc import Callable, Collection, Mapping

from azr_async.algorithm.groups import is_too_long
from azr_async.algorithm.library import IDENTITY_PROGRAM, Library
from azr_async.algorithm.staleness import Flow
from azr_async.algorithm.tally import Tally
from azr_async.errors import ConfigError
from azr_async.messages import Challenge, Judged, Problem, Rejected, Rollout, Task


class Filing:
    """Where the groups that `stages/advantage.py` completes end up."""

    def __init__(
        self,
        flow: Flow,
        library: Library,
        *,
        tasks: Collection[Task],
        usage: Callable[[], Mapping[str, float]],
        gauges: Callable[[], Mapping[str, float]],
        widths: Mapping[str, int],
        on_change: Callable[[], None],
    ) -> None:
        """`usage` gives running totals; those named in `widths` are seconds of so many workers and become shares."""
        self._flow = flow
        self._library = library
        self._tally = Tally(tasks)
        self._usage = usage
        self._gauges = gauges
        self._widths = widths
        self._on_change = on_change
        self._problems: dict[int, Problem] = {}
        self._last = (time.monotonic(), dict(usage()))

    def group(self, challenge: Challenge, judged: list[Judged], rollouts: list[Rollout]) -> None:
        """A group is whole."""
        self._tally.group(challenge, judged)
        if is_too_long(judged):
            self._let_go(challenge.problem)
        self._problems[challenge.group_id] = challenge.problem
        self._file(challenge.group_id, challenge.problem.task, rollouts)

    def rejected(self, rejected: Rejected, rollouts: list[Rollout]) -> None:
        """A proposal is no valid task."""
        self._tally.rejected(rejected)
        admission = rejected.proposal.admission
        if rejected.proposal.completion.finish == "prompt_too_long":
            for reference in rejected.proposal.references:
                self._let_go(reference)
        self._file(admission.group_id, admission.task, rollouts)

    def _let_go(self, problem: Problem) -> None:
        """Forget a task whose prompt does not fit the model's context, so that it is never drawn again.

        Raises ConfigError when it is the very first one, and nothing shorter can be asked.
        """
        if problem.program == IDENTITY_PROGRAM:
            raise ConfigError(
                "engine.context_tokens has no room even for a prompt about the identity function beside the longest "
                "completion. Raise engine.context_tokens, or lower propose.max_tokens and solve.max_tokens."
            )
        self._library.discard(problem)

    def dropped(self, rollouts: list[Rollout]) -> None:
        """Samples were too old to be trained; their tasks are drawn again next."""
        self._tally.dropped(rollouts)
        for group_id in sorted({rollout.group_id for rollout in rollouts}):
            if (problem := self._problems.pop(group_id, None)) is not None:
                self._library.give_back(problem)

    def stats(self) -> dict[str, float]:
        """Flat metrics since the last call."""
        alive = self._flow.groups()
        self._problems = {group: problem for group, problem in self._problems.items() if group in alive}
        sizes = {f"library.{task}": float(size) for task, size in self._library.sizes().items()}
        return self._tally.take() | self._rates() | sizes | dict(self._gauges())

    def _file(self, group_id: int, task: Task, rollouts: list[Rollout]) -> None:
        for rollout in rollouts:
            self._flow.complete(rollout)
        self._flow.release(group_id, ("propose", task))
        self._flow.release(group_id, ("solve", task))
        self._on_change()

    def _rates(self) -> dict[str, float]:
        now, totals = time.monotonic(), dict(self._usage())
        seconds, before = max(now - self._last[0], 1e-9), self._last[1]
        self._last = (now, totals)
        rates = {}
        for name, total in totals.items():
            change = total - before[name]
            rates[name] = min(1.0, change / (seconds * self._widths[name])) if name in self._widths else change
        return rates
