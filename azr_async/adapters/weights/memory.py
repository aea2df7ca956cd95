"""Buffers for buckets, taken again from the same memory: fresh memory costs more than the bytes that fill it."""

import weakref
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEPT: Final = 3
"""Buffers kept while nobody uses them: as many as are on their way in one push."""

_SMALLEST_BYTES: Final = 2**20
"""Smaller ones the allocator has at hand."""


class BufferMemory:
    """Lends buffers. The memory of one is lent again when its tensor and the last view of it have gone.

    On a GPU torch's own allocator does so. To be used from one thread; the last view may go in any.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._idle: list[NDArray[np.uint8]] = []

    def take(self, size_bytes: int) -> Tensor:
        """[size_bytes] uint8 with anything in it."""
        if self.device.type != "cpu" or size_bytes < _SMALLEST_BYTES:
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        # Other threads only append, so an index stays right.
        fitting = [(len(memory), index) for index, memory in enumerate(self._idle) if len(memory) >= size_bytes]
        if fitting:
            memory = self._idle.pop(min(fitting)[1])
        else:
            memory = np.empty(size_bytes, np.uint8)
            if self._idle:
                self._idle.pop(0)  # too small for what is sent now
        lent = memory[:size_bytes]
        # The storage of the tensor, and so every view of it, holds this array.
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return torch.from_numpy(lent)

    def _take_back(self, memory: NDArray[np.uint8]) -> None:
        if len(self._idle) < _KEPT:
            self._idle.append(memory)
