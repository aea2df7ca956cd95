"""Generation jobs: what a stage asks an engine for. Seeds depend on the loop's seed and the group, never on timing."""

import hashlib

from azr_async.messages import GenerateJob, Prompt, Role


def generation_job(
    role: Role,
    group_id: int,
    prompt: Prompt,
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
) -> GenerateJob:
    """`samples` completions for one role of a group. A group has at most one job per role; older groups go first."""
    return GenerateJob(
        job_id=2 * group_id + (role == "solve"),
        prompt=prompt,
        samples=samples,
        priority=group_id,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=job_seed(seed, role, group_id),
    )


def job_seed(seed: int, role: Role, group_id: int) -> int:
    """63 bits that are unrelated for different loops, roles and groups."""
    return _digest(f"{seed} {role} {group_id}")


def loop_seed(run_seed: int, start_version: int) -> int:
    """The seed of a self-play loop that starts with weights of `start_version`: the run's own at version 0.

    A resumed run counts its groups from 0 again. With the run's seed it would draw again what it drew at its start.
    """
    return run_seed if start_version == 0 else _digest(f"{run_seed} from version {start_version}")


def engine_seed(run_seed: int, worker: str) -> int:
    """31 bits for an engine that draws for all its sequences from one generator: unlike those of other workers."""
    return _digest(f"{run_seed} {worker}") >> 32


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
