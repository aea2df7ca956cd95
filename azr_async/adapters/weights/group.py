"""The ranks that weights are broadcast among: rank 0, the learner's, sends; the engines receive."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from azr_async.adapters.weights.buckets import unpacked
from azr_async.adapters.weights.memory import BufferMemory
from azr_async.adapters.weights.store import missing_keys, own_address
from azr_async.adapters.weights.stream import Broadcasts, Broken, received, sent
from azr_async.algorithm.digest import digest_for
from azr_async.errors import RanksLost, WeightsError

_GRACE_SECONDS: Final = 2.0
"""After a failure: time in which the ranks that are well can say so. They have to look in between."""

_LOOK_SECONDS: Final = 1.0
"""How often somebody who waits for ranks asks whether they are known to be gone, or have failed."""

_OVER: Final = "over"
"""Key that says that nobody has to wait in this group any more."""

_GLOO_THREADS: Final = 8
"""Each carries one broadcast at a time; with fewer, small tensors wait for one another."""

_GLOO_CONNECTIONS: Final = 2
"""Between two ranks, each with a thread of its own; broadcasts take turns. One is as fast as one core can copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A broadcast that every rank has confirmed."""

    digest: str
    size_bytes: int
    seconds: float
    """From when all ranks were ready until the last one had confirmed it."""


class WeightGroup:
    """One membership. When a rank is lost the group is, too: build the next one under another number."""

    def __init__(
        self,
        store: TCPStore,
        *,
        group: int,
        rank: int,
        world_size: int,
        device: torch.device,
        deadline_seconds: float,
        known_lost: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """Meet the other ranks. `known_lost` tells which are known to be gone: nobody waits any longer for those.

        Raises RanksLost naming those that did not come in time.
        """
        self._rank, self._world_size = rank, world_size
        self._deadline_seconds, self._known_lost = deadline_seconds, known_lost
        self._group = group
        self._store = _prefixed(store, group)
        self._push = 0
        self._memory = BufferMemory(device)
        self._began_seconds = time.perf_counter()
        try:
            self._tell(f"joined/{rank}")
            if missing := self._missing_ranks("joined", range(world_size)):
                raise self._error(f"was not joined by {_ranks(missing)}", missing)
            self._look()
            processes = _process_group(store, self._store, rank, world_size, device, deadline_seconds)
        except Broken as problem:
            raise self._error("could not be built", self._lost()) from problem
        # NCCL takes a broadcast that it was waited for in vain as failed, so that wait cannot be interrupted.
        look_seconds = _LOOK_SECONDS if device.type == "cpu" else deadline_seconds
        self._broadcasts = Broadcasts(processes, deadline_seconds, self._look, look_seconds)

    def send(self, tensors: Iterable[tuple[str, Tensor]], *, version: int, bucket_bytes: int) -> Sent:
        """Broadcast all tensors to the other ranks, wait until they have them.

        `tensors` is read as the broadcast goes on; at most those of two buckets and one tensor more are held, and only
        small ones copied. Raises RanksLost when a rank does not take part or stops on the way, WeightsError when one
        got other bytes. What `tensors` raises passes; in every case the group is over.
        """
        self._began_seconds = time.perf_counter()
        self._push += 1
        receivers, is_whole = range(1, self._world_size), False
        already_bytes = self._broadcasts.ended_bytes
        try:
            if absent := self._missing_ranks(f"{self._push}/ready", receivers):
                raise self._error(f"was to send version {version}: {_ranks(absent)} did not answer", absent)
            ready_seconds = time.perf_counter()
            digest = sent(self._broadcasts, self._memory, tensors, version=version, bucket_bytes=bucket_bytes)
            if late := self._missing_ranks(f"{self._push}/done", receivers):
                raise self._error(f"sent version {version}, but {_ranks(late)} did not confirm it", late)
            digests = self._digests(receivers)
            seconds = time.perf_counter() - ready_seconds
            is_whole = True
        except Broken as problem:
            suspects = self._suspects(receivers)
            raise self._error(
                f"was sending version {version} when {_ranks(suspects)} stopped answering, "
                f"after {(self._broadcasts.ended_bytes - already_bytes) / 1e6:.1f} MB",
                suspects,
            ) from problem
        finally:
            if not is_whole:
                self._try_to_tell(_OVER)
        if damaged := [rank for rank in receivers if digests[rank] != f"{digest:032x}"]:
            raise WeightsError(
                f"version {version} has digest {digest:032x}, but {_ranks(damaged)} of weight group {self._group} "
                f"received {digests[damaged[0]]}: the transfer was damaged. Resume from the last checkpoint; if it "
                "happens again, check the machine's network and memory."
            )
        size_bytes = self._broadcasts.ended_bytes - already_bytes
        return Sent(digest=f"{digest:032x}", size_bytes=size_bytes, seconds=seconds)

    def receive(self, install: Callable[[Iterator[tuple[str, Tensor]]], object]) -> tuple[int, str]:
        """Take part in one broadcast; `install` is called with the named tensors of each bucket, to be copied from.

        They are views of one buffer. Whoever keeps one keeps the buffer; one of which no view is left is used again for
        a later bucket. While `install` works, the next bucket comes.

        Returns the version and the digest of what was received. Raises RanksLost when rank 0 does not send or stops on
        the way, WeightsError when it sends what cannot be weights. What `install` raises passes; the others are told.
        """
        self._began_seconds = time.perf_counter()
        self._push += 1
        digest, count, version, is_whole = digest_for(self._memory.device), 0, -1, False
        try:
            self._tell(f"{self._push}/ready/{self._rank}")
            for head, bytes_N in received(self._broadcasts, self._memory, digest):
                version = head.version
                install(unpacked(head, bytes_N))
                count += 1
                if not head.is_last:
                    self._tell(f"{self._push}/buckets/{self._rank}", str(count))
            self._tell(f"{self._push}/done/{self._rank}", f"{digest.value:032x}")
            is_whole = True
        except Broken as problem:
            what = f"version {version}" if count else f"push {self._push}"
            raise self._error(
                f"got {count} buckets of {what}, then rank 0 (the learner) or a rank before this one stopped answering"
            ) from problem
        finally:
            if not is_whole:
                self._try_to_tell(f"{self._push}/failed/{self._rank}")
        return version, f"{digest.value:032x}"

    def close(self) -> None:
        """Leave. The other ranks do not notice: see `give_up`."""
        self._broadcasts.abort()

    def _missing_ranks(self, what: str, ranks: Iterable[int]) -> list[int]:
        """Wait for them. Those known to be lost, else those that did not come in time."""
        keys = {f"{what}/{rank}": rank for rank in ranks}
        give_up_at = time.monotonic() + self._deadline_seconds
        while True:
            left_seconds = max(0.0, give_up_at - time.monotonic())
            with _asking_the_store():
                missing = missing_keys(self._store, keys, min(_LOOK_SECONDS, left_seconds))
            lost = [keys[key] for key in missing if keys[key] in self._known_lost()]
            if lost or not missing or left_seconds <= _LOOK_SECONDS:
                return lost or [keys[key] for key in missing]
            self._look()

    def _look(self) -> None:
        """While waiting: is there still somebody to wait for? Raises Broken or RanksLost."""
        with _asking_the_store():
            if self._rank != 0:
                is_over, in_vain = self._store.check([_OVER]), False
            else:
                failed = (rank for rank in range(1, self._world_size) if self._says(rank, "failed"))
                is_over, in_vain = False, any(failed) or not all(self._says(rank, "done") for rank in self._lost())
        if is_over:
            raise self._error("was given up: rank 0 (the learner) or another rank failed or stopped answering")
        if in_vain:
            raise Broken

    def _lost(self) -> list[int]:
        """Known to be gone."""
        return sorted(set(range(self._world_size)) & set(self._known_lost()))

    def _digests(self, ranks: Collection[int]) -> dict[int, str]:
        with _asking_the_store():
            digests = self._store.multi_get([f"{self._push}/done/{rank}" for rank in ranks]) if ranks else []
        return {rank: digest.decode() for rank, digest in zip(ranks, digests, strict=True)}

    def _suspects(self, ranks: Iterable[int]) -> list[int]:
        """Ranks known to be lost; else, of those that neither finished nor told of a failure, who got fewest buckets.

        Nobody, when each has said how it ended: those can be asked again, or end by an error of their own.
        """
        self._try_to_tell(_OVER)
        if lost := self._lost():
            return lost
        try:
            keys = {f"{self._push}/failed/{rank}": rank for rank in ranks}
            silent = [keys[key] for key in missing_keys(self._store, keys, _GRACE_SECONDS)]
            silent = [rank for rank in silent if not self._says(rank, "done")]
            got = {rank: self._buckets_of(rank) for rank in silent}
        except RuntimeError:
            return []  # The store is gone, which is no rank's fault.
        return [rank for rank in silent if got[rank] == min(got.values())]

    def _buckets_of(self, rank: int) -> int:
        return int(self._store.get(f"{self._push}/buckets/{rank}")) if self._says(rank, "buckets") else 0

    def _says(self, rank: int, what: str) -> bool:
        return bool(self._store.check([f"{self._push}/{what}/{rank}"]))

    def _tell(self, key: str, value: str = "") -> None:
        with _asking_the_store():
            self._store.set(key, value)

    def _try_to_tell(self, key: str) -> None:
        """Of a failure; if the store is gone, the learner is, and there is nobody to tell."""
        with suppress(Broken):
            self._tell(key)

    def _error(self, happening: str, ranks: Collection[int] = ()) -> RanksLost:
        return RanksLost(
            f"weight group {self._group} (rank {self._rank} of {self._world_size}) {happening}, "
            f"{time.perf_counter() - self._began_seconds:.1f} s after it began. "
            "Look into the log of the process that is named; raise weights.deadline_seconds if it was only slow.",
            ranks,
        )


def give_up(store: TCPStore, group: int) -> None:
    """Whoever builds this group, or waits in it, gets RanksLost soon instead of at its deadline."""
    _prefixed(store, group).set(_OVER, "")


def _prefixed(store: TCPStore, group: int) -> PrefixStore:
    return PrefixStore(f"weights-{group}", store)


@contextmanager
def _asking_the_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        raise Broken from problem


def _process_group(
    address: TCPStore, store: PrefixStore, rank: int, world_size: int, device: torch.device, deadline_seconds: float
) -> Any:  # noqa: ANN401 - torch's type stubs do not know the operations of its process groups
    """The transport for tensors on `device`; the global default group is left alone. Raises Broken."""
    deadline = timedelta(seconds=deadline_seconds)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL  # absent from builds without CUDA

        torch.cuda.set_device(device)
        options = ProcessGroupNCCL.Options()
        options._timeout = deadline
        return ProcessGroupNCCL(store, rank, world_size, options)  # connects with the first broadcast
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = deadline
    options._threads = _GLOO_THREADS
    options._devices = [gloo.create_device(hostname=own_address(address)) for _ in range(_GLOO_CONNECTIONS)]
    try:
        return gloo(store, rank, world_size, options)  # connects to every rank
    except RuntimeError as problem:
        raise Broken from problem


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return "a rank"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
