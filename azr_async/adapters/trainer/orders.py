"""How rank 0 takes the other ranks along: whatever its trainer is asked for, it first orders them to do the same."""

from collections.abc import Callable, Iterator, Sequence
from enum import Enum

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from azr_async.adapters.trainer.ranks import share
from azr_async.adapters.trainer.report import StepReport
from azr_async.adapters.trainer.trainer import Trainer
from azr_async.messages import RolloutBatch


class Order(Enum):
    """The first byte of what rank 0 sends; the rest is what it is about."""

    TRAIN = b"t"
    SCORE = b"s"
    WEIGHTS = b"w"
    CHECKPOINT = b"c"
    END = b"e"


class Crew:
    """All ranks of a learner as one trainer; only rank 0 has it, the others `follow`.

    Ranks that have all of the weights are needed for training only, sharded ones for everything.
    """

    def __init__(self, trainer: Trainer, accelerator: Accelerator, *, encode: Callable[[RolloutBatch], bytes]) -> None:
        self._trainer, self._accelerator, self._encode = trainer, accelerator, encode

    @property
    def version(self) -> int:
        """Optimizer steps inside the weights."""
        return self._trainer.version

    @property
    def device(self) -> torch.device:
        """Where the weights are used."""
        return self._trainer.device

    def train(self, batch: RolloutBatch) -> StepReport:
        """As `Trainer.train`, on all ranks. Raises PeerVanished when one is gone."""
        if self._accelerator.num_processes > 1:
            self._order(Order.TRAIN, self._encode(batch))
        return self._trainer.train(batch)

    def score(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """As `Trainer.score`."""
        if self._trainer.is_sharded:
            self._order(Order.SCORE, _to_bytes(sequences))
        return self._trainer.score(sequences)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As `Trainer.named_weights`; take all of them, or the other ranks wait for the rest."""
        if self._trainer.is_sharded:
            self._order(Order.WEIGHTS)
        yield from self._trainer.named_weights()

    def checkpoint_state(self) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
        """`Trainer.model_state` and `Trainer.optimizer_state`."""
        if self._trainer.is_sharded:
            self._order(Order.CHECKPOINT)
        return self._trainer.model_state(), self._trainer.optimizer_state()

    def dismiss(self) -> None:
        """The run is over: the other ranks' `follow` returns."""
        self._order(Order.END)

    def _order(self, order: Order, content: bytes = b"") -> None:
        share(order.value + content, self._accelerator)


def follow(trainer: Trainer, accelerator: Accelerator, *, decode: Callable[[bytes], RolloutBatch]) -> None:
    """Be another rank than 0: do what is ordered until the run is over. Raises PeerVanished when rank 0 is gone."""
    while True:
        payload = share(b"", accelerator)
        order, content = Order(payload[:1]), payload[1:]
        match order:
            case Order.TRAIN:
                trainer.train(decode(content))
            case Order.SCORE:
                trainer.score(_from_bytes(content))
            case Order.WEIGHTS:
                for _ in trainer.named_weights():
                    pass
            case Order.CHECKPOINT:
                trainer.model_state()
                trainer.optimizer_state()
            case Order.END:
                return


def _to_bytes(sequences: Sequence[NDArray[np.int32]]) -> bytes:
    return np.concatenate([[len(sequences)], [len(ids) for ids in sequences], *sequences]).astype(np.int32).tobytes()


def _from_bytes(content: bytes) -> list[NDArray[np.int32]]:
    count, *_ = numbers = np.frombuffer(content, np.int32)
    lengths, ids = numbers[1 : 1 + count], numbers[1 + count :]
    return np.split(ids, np.cumsum(lengths)[:-1])
