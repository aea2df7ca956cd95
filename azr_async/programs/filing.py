"""Files finished samples into the flow, gives dropped prompts back to the library, and counts for the metrics."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from azr_async.algorithm.groups import is_too_long
from azr_async.algorithm.judging import RIGHT
from azr_async.algorithm.ledger import Ledger, SampleId, closed_twice
from azr_async.algorithm.library import IDENTITY_PROGRAM, Library
from azr_async.algorithm.staleness import Flow
from azr_async.algorithm.tally import Tally
from azr_async.errors import ConfigError
from azr_async.messages import Admission, Challenge, Judged, Problem, Rejected, Role, Rollout, Task


class Filing:
    """Where the groups that `stages/advantage.py` completes end up."""

    def __init__(
        self,
        flow: Flow,
        library: Library,
        ledger: Ledger,
        *,
        tasks: Collection[Task],
        usage: Callable[[], Mapping[str, float]],
        gauges: Callable[[], Mapping[str, float]],
        widths: Callable[[], Mapping[str, float]],
        on_change: Callable[[], None],
    ) -> None:
        """`usage` gives running totals; those named in `widths` are seconds of so many workers, and become shares."""
        self._flow = flow
        self._library = library
        self._ledger = ledger
        self._samples: dict[int, SampleId] = {}  # by rollout, while it waits for a batch
        self._tally = Tally(tasks)
        self._usage = usage
        self._gauges = gauges
        self._widths = widths
        self._on_change = on_change
        self._problems: dict[int, Problem] = {}
        self._last = (time.monotonic(), dict(usage()))

    def admitted(self, group: Admission) -> None:
        """A group starts."""
        if not self._ledger.has_open(group.group_id):  # else it starts anew, and is entered already
            self._ledger.lease(group)

    def group(self, challenge: Challenge, judged: list[Judged], rollouts: list[Rollout]) -> None:
        """A group is whole."""
        self._tally.group(challenge, judged)
        if is_too_long(judged):
            self._let_go(challenge.problem)
        self._problems[challenge.group_id] = challenge.problem
        proposer = [rollout.reward for rollout in rollouts if rollout.role == "propose"]
        self._library.note_result(
            challenge.problem,
            attempts=len(judged),
            successes=sum(item.reward == RIGHT for item in judged),
            reward=proposer[0] if proposer else None,
        )
        rest = "its task fits no prompt" if is_too_long(judged) else "the sandbox could not judge it"
        self._file(challenge.group_id, challenge.problem.task, rollouts, rest=rest)

    def rejected(self, rejected: Rejected, rollouts: list[Rollout]) -> None:
        """A proposal is no valid task."""
        self._tally.rejected(rejected)
        admission = rejected.proposal.admission
        if rejected.proposal.completion.finish == "prompt_too_long":
            for reference in rejected.proposal.references:
                self._let_go(reference)
        self._file(admission.group_id, admission.task, rollouts, rest=f"rejected: {rejected.reason}")

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
        for rollout in rollouts:
            self._ledger.dropped(self._samples.pop(rollout.rollout_id), "too old", version=self._flow.version)
        for group_id in sorted({rollout.group_id for rollout in rollouts}):
            if (problem := self._problems.pop(group_id, None)) is not None:
                self._library.give_back(problem)

    def batch(self, version: int, rollouts: list[Rollout]) -> None:
        """Samples go to the learner, for the step that makes version + 1.

        Raises TrainingError when one of them has been in a batch before.
        """
        for rollout in rollouts:
            sample = self._samples.pop(rollout.rollout_id, None)
            if sample is None or not self._ledger.admitted(sample, version=version):
                raise closed_twice(f"rollout {rollout.rollout_id} of group {rollout.group_id}")

    def stats(self) -> dict[str, float]:
        """Flat metrics since the last call."""
        alive = self._flow.groups()
        self._problems = {group: problem for group, problem in self._problems.items() if group in alive}
        sizes = {f"library.{task}": float(size) for task, size in self._library.sizes().items()}
        return self._tally.take() | self._rates() | sizes | dict(self._gauges())

    def _file(self, group_id: int, task: Task, rollouts: list[Rollout], *, rest: str) -> None:
        """`rest`: why those samples of the group are dropped that are not among its rollouts."""
        numbers = Counter[Role]()
        for rollout in rollouts:
            sample = SampleId(group_id, rollout.role, numbers[rollout.role])
            numbers[rollout.role] += 1
            self._samples[rollout.rollout_id] = sample
            self._ledger.judged(sample, rollout.reward)
            self._flow.complete(rollout)
        self._ledger.drop_rest(group_id, rest, version=self._flow.version)
        self._flow.release(group_id, ("propose", task))
        self._flow.release(group_id, ("solve", task))
        self._on_change()

    def _rates(self) -> dict[str, float]:
        now, totals = time.monotonic(), dict(self._usage())
        seconds, before = max(now - self._last[0], 1e-9), self._last[1]
        self._last = (now, totals)
        rates, widths = {}, self._widths()
        for name, total in totals.items():
            change = total - before[name]
            rates[name] = min(1.0, change / (seconds * widths[name])) if name in widths else change
        return rates
