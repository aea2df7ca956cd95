"""A completion of one token, for tests to which only its text and its end matter."""

import numpy as np

from azr_async.messages import Completion, Finish


def a_completion(text: str = "", finish: Finish = "stop") -> Completion:
    """Of sample 0 of job 1."""
    one = np.ones(1, np.int32)
    return Completion(
        job_id=1,
        index=0,
        finish=finish,
        text=text,
        prompt_ids=one,
        token_ids=one,
        behavior_logp=np.zeros(1, np.float32),
        token_version=one,
    )
