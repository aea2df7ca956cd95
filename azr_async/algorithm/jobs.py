"""Generation jobs: what a stage asks an engine for. Seeds depend on the run's seed and the group, never on timing."""

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
    """63 bits that are unrelated for different runs, roles and groups."""
    digest = hashlib.blake2b(f"{seed} {role} {group_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
