"""A push as it goes over the wire: the order of its broadcasts, which sender and receivers have to agree on.

    head 0, head 1, bucket 0, head 2, bucket 1, head 3, bucket 2, ...

The head of a bucket comes before the bucket that precedes it, so that a receiver has made room for a bucket before it
comes and the wire never waits. A bucket is broadcast in pieces, and several pieces are on their way at a time: both
sides compute the checksum of one while others are, and receivers install a bucket while the next one comes.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Final

from torch import Tensor
from torch.distributed import BroadcastOptions

from azr_async.adapters.weights.buckets import (
    HEAD_BYTES,
    Bucket,
    Head,
    bucketed,
    packed_head,
    parsed_head,
    parts,
    payload,
)
from azr_async.adapters.weights.memory import BufferMemory
from azr_async.algorithm.digest import Digest, digest_for

_CPU_PIECE_BYTES: Final = 2**23
"""A few of them fit into a CPU's cache, where the next one who reads them finds them."""
_GPU_PIECE_BYTES: Final = 2**26
_PIECES_UNDER_WAY: Final = 3


class Broken(Exception):
    """Ranks that this one needs stopped answering; what fails in this process is another error."""


class Broadcasts:
    """Broadcasts from rank 0, waited for in the order in which they began. Raises Broken when a rank is lost."""

    def __init__(
        self,
        processes: Any,  # noqa: ANN401 - see _process_group
        deadline_seconds: float,
        look: Callable[[], None],
        look_seconds: float,
    ) -> None:
        """Who waits calls `look` every so many seconds; what it raises ends the waiting."""
        self._processes = processes
        self._deadline = timedelta(seconds=deadline_seconds)
        self._look, self._look_seconds = look, look_seconds
        self.ended_bytes = 0
        self._under_way: deque[tuple[Tensor, Any]] = deque()

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._under_way)

    @property
    def bytes_under_way(self) -> int:
        """Of all broadcasts that have not ended."""
        return sum(tensor.nbytes for tensor, _ in self._under_way)

    def begin(self, tensor: Tensor) -> None:
        """On rank 0 the tensor must not change until the broadcast has ended; on others it will."""
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._deadline
        try:
            work = self._processes.broadcast([tensor], options)
        except RuntimeError as problem:
            raise Broken from problem
        self._under_way.append((tensor, work))

    def end_oldest(self) -> Tensor:
        """Wait for it, for the deadline at most; gives its tensor."""
        tensor, work = self._under_way.popleft()
        give_up_at = time.monotonic() + self._deadline.total_seconds()
        while not self._has_ended(work, give_up_at - time.monotonic()):
            self._look()
        self.ended_bytes += tensor.nbytes
        return tensor

    def _has_ended(self, work: Any, left_seconds: float) -> bool:  # noqa: ANN401 - see _process_group
        """Wait a while for it."""
        had_ended, is_last_look = work.is_completed(), left_seconds <= self._look_seconds
        try:
            work.wait(timedelta(seconds=max(0.001, min(left_seconds, self._look_seconds))))
        except RuntimeError as problem:  # it failed, or goes on: one that had ended before cannot go on
            if had_ended or is_last_look:
                raise Broken from problem
            return False
        return True

    def abort(self) -> None:
        """End them all; no other can begin."""
        self._processes.abort()


def sent(
    broadcasts: Broadcasts,
    memory: BufferMemory,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    version: int,
    bucket_bytes: int,
) -> int:
    """Broadcast them. Returns the digest, when all broadcasts have ended."""
    digest = digest_for(memory.device)
    for piece_N in _outgoing(memory, bucketed(tensors, version=version, bucket_bytes=bucket_bytes)):
        broadcasts.begin(piece_N)
        digest.add(piece_N)
        while broadcasts.bytes_under_way > _PIECES_UNDER_WAY * _piece_bytes(piece_N):
            broadcasts.end_oldest()
    while broadcasts:
        broadcasts.end_oldest()
    return digest.value


def received(broadcasts: Broadcasts, memory: BufferMemory, digest: Digest) -> Iterator[tuple[Head, Tensor]]:
    """Each bucket's head and bytes, which `digest` has got. The next bucket comes meanwhile.

    Raises WeightsError when what comes cannot be weights.
    """

    def begin(size_bytes: int) -> Tensor:
        tensor = memory.take(size_bytes)
        broadcasts.begin(tensor)
        return tensor

    def end_oldest() -> Tensor:
        tensor = broadcasts.end_oldest()
        digest.add(tensor)
        return tensor

    def begin_bucket(head: Head) -> tuple[Head, Tensor, int]:
        if not head.is_last:
            begin(HEAD_BYTES)
        bytes_N = memory.take(head.total_bytes)
        before = len(broadcasts)
        for part_N in parts(head, bytes_N):
            for piece_N in _pieces(part_N):
                broadcasts.begin(piece_N)
        return head, bytes_N, len(broadcasts) - before

    begin(HEAD_BYTES)
    head, bytes_N, pieces = begin_bucket(parsed_head(end_oldest()))
    while not head.is_last:
        following = begin_bucket(parsed_head(end_oldest()))
        for _ in range(pieces):
            end_oldest()
        yield head, bytes_N
        head, bytes_N, pieces = following
    for _ in range(pieces):
        end_oldest()
    yield head, bytes_N


def _outgoing(memory: BufferMemory, buckets: Iterable[Bucket]) -> Iterator[Tensor]:
    waiting: Bucket | None = None
    for bucket in buckets:
        yield packed_head(bucket).to(memory.device)
        if waiting is not None:
            yield from _bucket_pieces(waiting, memory)
        waiting = bucket
    if waiting is not None:
        yield from _bucket_pieces(waiting, memory)


def _bucket_pieces(bucket: Bucket, memory: BufferMemory) -> Iterator[Tensor]:
    for part_N in payload(bucket, memory):
        yield from _pieces(part_N)


def _pieces(part_N: Tensor) -> Iterator[Tensor]:
    size = _piece_bytes(part_N)
    for start in range(0, len(part_N), size):
        yield part_N[start : start + size]


def _piece_bytes(part_N: Tensor) -> int:
    return _CPU_PIECE_BYTES if part_N.device.type == "cpu" else _GPU_PIECE_BYTES
