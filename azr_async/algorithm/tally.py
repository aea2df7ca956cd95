"""What self-play counts between two batches, and the rates that become metrics."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from azr_async.algorithm.judging import RIGHT
from azr_async.messages import Challenge, Judged, Rejected, Rollout, Task, cell_name


@dataclass(slots=True)
class Tally:
    """Counters since the last `take`."""

    tasks: Collection[Task]
    _counts: Counter[str] = field(default_factory=Counter)

    def group(self, challenge: Challenge, judged: Sequence[Judged]) -> None:
        """A group is whole."""
        task = challenge.problem.task
        solved = sum(item.reward == RIGHT for item in judged)
        if challenge.proposal is None:
            self._counts["groups.library"] += 1
            return
        self._counts[f"proposals.{task}"] += 1
        self._counts[f"valid.{task}"] += 1
        self._counts[f"attempts.{task}"] += len(judged)
        self._counts[f"solved.{task}"] += solved
        if len(judged) == challenge.attempts:  # else its proposal is not rewarded either
            self._counts[f"scored.{task}"] += 1
            self._counts[f"learnable.{task}"] += 0 < solved < len(judged)

    def rejected(self, rejected: Rejected) -> None:
        """A proposal is no valid task."""
        self._counts[f"rejected.{rejected.reason}"] += 1
        if rejected.is_trained:
            self._counts[f"proposals.{rejected.proposal.admission.task}"] += 1

    def dropped(self, rollouts: Iterable[Rollout]) -> None:
        """Samples were too old to be trained: by cell, length and reward, so that a bias would show."""
        for rollout in rollouts:
            tokens = len(rollout.token_ids) - rollout.prompt_length
            self._counts["samples.dropped"] += 1
            self._counts["tokens.dropped"] += tokens
            self._counts[f"dropped.{cell_name((rollout.role, rollout.task))}"] += 1
            self._counts["dropped.reward_sum"] += rollout.reward  # type: ignore[assignment]

    def take(self) -> dict[str, float]:
        """Rates and counts as flat metric names; starts anew. A rate of nothing is left out."""
        counts, self._counts = self._counts, Counter()
        metrics: dict[str, float] = {"samples.dropped": 0.0, "tokens.dropped": 0.0}
        for task in self.tasks:
            for name, part, whole in (
                ("valid_rate", "valid", "proposals"),
                ("solve_rate", "solved", "attempts"),
                ("learnable_rate", "learnable", "scored"),
            ):
                if counts[f"{whole}.{task}"]:
                    metrics[f"{name}.{task}"] = counts[f"{part}.{task}"] / counts[f"{whole}.{task}"]
        listed = ("rejected.", "dropped.", "samples.", "tokens.", "groups.")
        metrics |= {name: float(count) for name, count in counts.items() if name.startswith(listed)}
        return metrics
