"""The ranks that weights are broadcast among: rank 0, the learner's, sends; the engines receive."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from azr_async.adapters.weights.buckets import unpacked
from azr_async.adapters.weights.memory import BufferMemory
from azr_async.adapters.weights.store import missing_keys, own_address
from azr_async.adapters.weights.stream import Broadcasts, received, sent
from azr_async.algorithm.digest import digest_for
from azr_async.errors import RanksLost, WeightsError

_GRACE_SECONDS: Final = 2.0
"""After a failure: time in which the ranks that are well can say so."""

_LOOK_SECONDS: Final = 2.0
"""How often somebody who waits for ranks asks whether they are known to be gone."""

_GLOO_THREADS: Final = 4
"""Each carries one broadcast at a time; with fewer, small tensors wait for one another."""


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
        self._store = PrefixStore(f"weights-{group}", store)
        self._push = 0
        self._memory = BufferMemory(device)
        began_seconds = time.perf_counter()
        try:
            self._store.set(f"joined/{rank}", "")
            missing = self._missing_ranks("joined", range(world_size), deadline_seconds)
            if not missing:
                processes = _process_group(store, self._store, rank, world_size, device, deadline_seconds)
                self._broadcasts = Broadcasts(processes, deadline_seconds)
        except RuntimeError as problem:
            raise self._error("could not be built", began_seconds) from problem
        if missing:
            raise self._error(f"was not joined by {_ranks(missing)}", began_seconds, missing)

    def send(self, tensors: Iterable[tuple[str, Tensor]], *, version: int, bucket_bytes: int) -> str:
        """Broadcast all tensors to the other ranks, wait until they have them. Returns the digest of what was sent.

        `tensors` is read as the broadcast goes on; at most those of two buckets and one tensor more are held, and only
        small ones copied. Raises WeightsError when a rank does not take part, stops on the way, or got other bytes.
        """
        began_seconds = time.perf_counter()
        self._push += 1
        receivers = range(1, self._world_size)
        already_bytes = self._broadcasts.ended_bytes
        try:
            absent = self._missing_ranks(f"{self._push}/ready", receivers, self._deadline_seconds)
            if absent:
                happening = f"was to send version {version}: {_ranks(absent)} did not answer"
                raise self._error(happening, began_seconds, absent)
            digest = sent(self._broadcasts, self._memory, tensors, version=version, bucket_bytes=bucket_bytes)
            late = self._missing_ranks(f"{self._push}/done", receivers, self._deadline_seconds)
            digests = self._digests([rank for rank in receivers if rank not in late])
        except RuntimeError as problem:
            suspects = self._suspects(receivers)
            raise self._error(
                f"was sending version {version} when {_ranks(suspects)} stopped answering, "
                f"after {(self._broadcasts.ended_bytes - already_bytes) / 1e6:.1f} MB",
                began_seconds,
                suspects,
            ) from problem
        if late:
            raise self._error(f"sent version {version}, but {_ranks(late)} did not confirm it", began_seconds, late)
        if damaged := [rank for rank in receivers if digests[rank] != f"{digest:032x}"]:
            raise WeightsError(
                f"version {version} has digest {digest:032x}, but {_ranks(damaged)} of weight group {self._group} "
                f"received {digests[damaged[0]]}: the transfer was damaged. Resume from the last checkpoint; if it "
                "happens again, check the machine's network and memory."
            )
        return f"{digest:032x}"

    def receive(self, install: Callable[[Iterator[tuple[str, Tensor]]], object]) -> tuple[int, str]:
        """Take part in one broadcast; `install` is called with the named tensors of each bucket, to be copied from.

        They are views of one buffer. Whoever keeps one keeps the buffer; one of which no view is left is used again for
        a later bucket. While `install` works, the next bucket comes.

        Returns the version and the digest of what was received. Raises WeightsError when rank 0 does not send, stops on
        the way, or sends what cannot be weights.
        """
        began_seconds = time.perf_counter()
        self._push += 1
        digest, count, version, is_whole = digest_for(self._memory.device), 0, -1, False
        try:
            self._store.set(f"{self._push}/ready/{self._rank}", "")
            for head, bytes_N in received(self._broadcasts, self._memory, digest):
                version = head.version
                install(unpacked(head, bytes_N))
                count += 1
                if not head.is_last:
                    self._store.set(f"{self._push}/buckets/{self._rank}", str(count))
            self._store.set(f"{self._push}/done/{self._rank}", f"{digest.value:032x}")
            is_whole = True
        except RuntimeError as problem:
            what = f"version {version}" if count else f"push {self._push}"
            raise self._error(
                f"got {count} buckets of {what}, then rank 0 (the learner) or a rank before this one stopped answering",
                began_seconds,
            ) from problem
        finally:
            if not is_whole:
                self._tell_failure()
        return version, f"{digest.value:032x}"

    def close(self) -> None:
        """Leave; the other ranks notice at their next operation."""
        self._broadcasts.abort()

    def _missing_ranks(self, what: str, ranks: Iterable[int], wait_seconds: float) -> list[int]:
        keys = {f"{what}/{rank}": rank for rank in ranks}
        give_up_at = time.monotonic() + wait_seconds
        while True:
            left_seconds = max(0.0, give_up_at - time.monotonic())
            missing = missing_keys(self._store, keys, min(_LOOK_SECONDS, left_seconds))
            lost = [keys[key] for key in missing if keys[key] in self._known_lost()]
            if lost or not missing or left_seconds <= _LOOK_SECONDS:
                return lost or [keys[key] for key in missing]

    def _digests(self, ranks: list[int]) -> dict[int, str]:
        digests = self._store.multi_get([f"{self._push}/done/{rank}" for rank in ranks]) if ranks else []
        return {rank: digest.decode() for rank, digest in zip(ranks, digests, strict=True)}

    def _suspects(self, ranks: Iterable[int]) -> list[int]:
        """Of the ranks that neither finished nor told of a failure, those that got fewest buckets."""
        try:
            silent = self._missing_ranks(f"{self._push}/failed", ranks, _GRACE_SECONDS)
            silent = [rank for rank in silent if not self._store.check([f"{self._push}/done/{rank}"])]
            keys = {rank: f"{self._push}/buckets/{rank}" for rank in silent}
            got = {rank: int(self._store.get(key)) if self._store.check([key]) else 0 for rank, key in keys.items()}
        except RuntimeError:
            return list(ranks)
        return [rank for rank in silent if got[rank] == min(got.values())] or list(ranks)

    def _tell_failure(self) -> None:
        try:
            self._store.set(f"{self._push}/failed/{self._rank}", "")
        except RuntimeError:
            return  # The store went with the learner: there is nobody to tell.

    def _error(self, happening: str, began_seconds: float, ranks: Collection[int] = ()) -> RanksLost:
        return RanksLost(
            f"weight group {self._group} (rank {self._rank} of {self._world_size}) {happening}, "
            f"{time.perf_counter() - began_seconds:.1f} s after it began. "
            "Look into the log of the process that is named; raise weights.deadline_seconds if it was only slow.",
            ranks,
        )


def _process_group(
    address: TCPStore, store: PrefixStore, rank: int, world_size: int, device: torch.device, deadline_seconds: float
) -> Any:  # noqa: ANN401 - torch's type stubs do not know the operations of its process groups
    """The transport for tensors on `device`; the global default group is left alone."""
    deadline = timedelta(seconds=deadline_seconds)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL  # absent from builds without CUDA

        torch.cuda.set_device(device)
        options = ProcessGroupNCCL.Options()
        options._timeout = deadline
        return ProcessGroupNCCL(store, rank, world_size, options)
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = deadline
    options._threads = _GLOO_THREADS
    options._devices = [gloo.create_device(hostname=own_address(address))]
    return gloo(store, rank, world_size, options)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
