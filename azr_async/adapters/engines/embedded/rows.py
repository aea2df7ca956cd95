"""The running sequences, as columns of numbers: what a step needs to know about each row, on the host."""

from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from azr_async.adapters.engines.texts import Texts
from azr_async.messages import Completion, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """One sample that waits for a row or has one."""

    priority: int
    job_id: int
    index: int
    prompt: Prompt
    prompt_ids: NDArray[np.int32]
    max_tokens: int
    temperature: float
    top_p: float
    key: np.uint64
    """Of its random stream."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Arrays over all slots, of which rows 0 .. count - 1 are running; `count` is kept by the engine."""

    tokens_SC: NDArray[np.int64]
    logp_SC: NDArray[np.float32]
    version_SC: NDArray[np.int32]
    prompt_length_S: NDArray[np.int64]
    length_S: NDArray[np.int64]
    """Tokens so far, prompt included. All but the last are in the key-value cache."""
    limit_S: NDArray[np.int64]
    """Length at which max_tokens is reached."""
    key_S: NDArray[np.uint64]
    temperature_S: NDArray[np.float32]
    top_p_S: NDArray[np.float32]
    has_stop_S: NDArray[np.bool_]
    sequence_S: NDArray[np.object_]

    @classmethod
    def empty(cls, slots: int, context_tokens: int) -> Self:
        """Room for `slots` sequences."""
        return cls(
            tokens_SC=np.zeros((slots, context_tokens), np.int64),
            logp_SC=np.zeros((slots, context_tokens), np.float32),
            version_SC=np.zeros((slots, context_tokens), np.int32),
            prompt_length_S=np.zeros(slots, np.int64),
            length_S=np.zeros(slots, np.int64),
            limit_S=np.zeros(slots, np.int64),
            key_S=np.zeros(slots, np.uint64),
            temperature_S=np.zeros(slots, np.float32),
            top_p_S=np.zeros(slots, np.float32),
            has_stop_S=np.zeros(slots, np.bool_),
            sequence_S=np.full(slots, None, np.object_),
        )

    def fill(self, row: int, sequence: Sequence) -> None:
        """Start a sequence in a free row."""
        prompt_length = len(sequence.prompt_ids)
        self.tokens_SC[row, :prompt_length] = sequence.prompt_ids
        self.prompt_length_S[row] = self.length_S[row] = prompt_length
        self.limit_S[row] = prompt_length + sequence.max_tokens
        self.key_S[row] = sequence.key
        self.temperature_S[row] = sequence.temperature
        self.top_p_S[row] = sequence.top_p
        self.has_stop_S[row] = bool(sequence.prompt.stop)
        self.sequence_S[row] = sequence

    def append_token(self, count: int, token_B: NDArray[np.int64], logp_B: NDArray[np.float32], version: int) -> None:
        """Every running row gets its next token."""
        rows_B, end_B = np.arange(count), self.length_S[:count]
        self.tokens_SC[rows_B, end_B] = token_B
        self.logp_SC[rows_B, end_B] = logp_B
        self.version_SC[rows_B, end_B] = version
        self.length_S[:count] += 1

    def completion(self, row: int, finish: Literal["stop", "length"], texts: Texts) -> Completion:
        """What an ended row holds, copied out of it."""
        sequence: Sequence = self.sequence_S[row]
        answer = slice(self.prompt_length_S[row], self.length_S[row])
        return Completion(
            job_id=sequence.job_id,
            index=sequence.index,
            finish=finish,
            text=texts.completion_text(sequence.prompt, self.tokens_SC[row, answer]),
            prompt_ids=sequence.prompt_ids,
            token_ids=self.tokens_SC[row, answer].astype(np.int32),
            behavior_logp=self.logp_SC[row, answer].copy(),
            token_version=self.version_SC[row, answer].copy(),
        )

    def move(self, holes_B: NDArray[np.int64], movers_B: NDArray[np.int64]) -> None:
        """Copy rows over the holes that ended sequences left."""
        for column in fields(self):
            array = getattr(self, column.name)
            array[holes_B] = array[movers_B]


def compaction(count: int, ended_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows to fill and which rows fill them, so that the remaining rows are 0 .. count - len(ended) - 1.

    Only as many rows move as have ended, and never one that has ended.
    """
    remaining = count - len(ended_B)
    holes_B = ended_B[ended_B < remaining]
    tail_B = np.arange(remaining, count)
    return holes_B, tail_B[~np.isin(tail_B, ended_B)]
