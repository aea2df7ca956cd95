"""Which jobs make sense, the answer to those that cannot be served, and which samples are none."""

import numpy as np
from numpy.typing import NDArray

from azr_async.errors import EngineError
from azr_async.messages import Completion, GenerateJob


def check_job(job: GenerateJob) -> None:
    """Raises EngineError when nothing can be sampled as the job asks."""
    if job.samples < 1 or job.max_tokens < 1 or job.temperature < 0 or not 0 < job.top_p <= 1 or "" in job.prompt.stop:
        raise EngineError(
            f"job {job.job_id} asks for {job.samples} samples of {job.max_tokens} tokens at temperature "
            f"{job.temperature} and top_p {job.top_p}, stopping at {job.prompt.stop}. It needs at least one sample and "
            "token, temperature >= 0, 0 < top_p <= 1 and stop texts that are not empty; check propose and solve."
        )


def refusals(job: GenerateJob) -> list[Completion]:
    """The answers to a job whose prompt leaves no room for its completions."""
    nothing = np.zeros(0, np.int32)
    return [
        Completion(
            job_id=job.job_id,
            index=index,
            finish="prompt_too_long",
            text="",
            prompt_ids=nothing,
            token_ids=nothing,
            behavior_logp=np.zeros(0, np.float32),
            token_version=nothing,
        )
        for index in job.wanted
    ]


def check_finite(logp: NDArray[np.float32], version: int) -> None:
    """Raises EngineError when weights have gone bad: nothing that they sample can be trained on."""
    if not np.isfinite(logp).all():
        raise EngineError(
            f"the model's weights of version {version} give log-probabilities that are not finite. "
            "Lower learner.learning_rate or learner.clip_norm, and resume from a checkpoint before this version."
        )
