"""How a run can go on: what self-play knew when the weights of a checkpoint were installed.

The learner files this text with its own part of a checkpoint, so that both are of one version. The tasks themselves and
the ledger are in the journal; here is which of them were known, how they had been used, and where the numbers stood.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from azr_async.algorithm.library import KnownTask, Library, TaskUse, identity_problem, task_key
from azr_async.errors import CheckpointError
from azr_async.messages import TASKS, Problem

FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where self-play stood when weights of `version` were installed."""

    version: int
    run_seed: int
    """`run.seed`."""
    seed: int
    """Of everything that is drawn, from the run's first version on."""
    first_group: int
    """Numbers of groups from here on are free."""
    next_round: int
    """The same for groups outside the flow; they count down."""
    newest_task: int
    """Rows of the journal up to here were known, or had been let go."""
    tasks: Mapping[bytes, TaskUse]
    """The library by key, in its order."""


def library_of(standing: Standing, problems: Iterable[Problem], *, capacity: int) -> Library:
    """The library as it stood, with its tasks out of `problems`.

    Raises CheckpointError when there is none of its tasks among them: it is another run's journal, or none.
    """
    by_key = {task_key(problem): problem for problem in (*map(identity_problem, TASKS), *problems)}
    missing = len(standing.tasks.keys() - by_key.keys())
    if missing:
        raise CheckpointError(
            f"{missing} of {len(standing.tasks)} tasks that the checkpoint of version {standing.version} knew are not "
            "in journal.sqlite. Put the journal of its run back, or start a new run from the checkpoint with --model."
        )
    known = [KnownTask(problem=by_key[key], use=use) for key, use in standing.tasks.items()]
    return Library.restored(known, capacity=capacity, seed=standing.seed)


def written(standing: Standing) -> str:
    """The text that `read` takes."""
    content = {
        "format": FORMAT,
        "version": standing.version,
        "run_seed": standing.run_seed,
        "seed": standing.seed,
        "first_group": standing.first_group,
        "next_round": standing.next_round,
        "newest_task": standing.newest_task,
        "tasks": [
            [key.hex(), use.draws, use.attempts, use.successes, use.reward, use.last_use]
            for key, use in standing.tasks.items()
        ],
    }
    return json.dumps(content)


def read(text: str) -> Standing:
    """Raises CheckpointError when the text is of another program's version."""
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError("another format")
        return Standing(
            version=content["version"],
            run_seed=content["run_seed"],
            seed=content["seed"],
            first_group=content["first_group"],
            next_round=content["next_round"],
            newest_task=content["newest_task"],
            tasks={bytes.fromhex(key): _use(*numbers) for key, *numbers in content["tasks"]},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"selfplay.json of the checkpoint cannot be read: {error}. Resume with the program version that wrote it."
        ) from error


def _use(draws: int, attempts: int, successes: int, reward: float | None, last_use: int | None) -> TaskUse:
    return TaskUse(draws=draws, attempts=attempts, successes=successes, reward=reward, last_use=last_use)
