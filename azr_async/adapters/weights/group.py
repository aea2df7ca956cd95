"""The ranks that weights are broadcast among: rank 0, the learner's, sends; the engines receive."""

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from azr_async.adapters.weights.buckets import MAGIC, Bucket, checked_header, packed, unpacked
from azr_async.adapters.weights.store import missing_keys, own_address
from azr_async.algorithm.digest import chained, checksum
from azr_async.errors import WeightsError

_GRACE_SECONDS: Final = 2.0
"""After a failure: time in which the ranks that are well can say so."""


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
    ) -> None:
        """Meet the other ranks. Raises WeightsError naming those that did not come in time."""
        self._rank, self._world_size, self._device = rank, world_size, device
        self._deadline_seconds = deadline_seconds
        self._group = group
        self._store = PrefixStore(f"weights-{group}", store)
        self._push = 0
        began_seconds = time.perf_counter()
        try:
            self._store.set(f"joined/{rank}", "")
            missing = self._missing_ranks("joined", range(world_size), deadline_seconds)
            if not missing:
                self._processes = _process_group(store, self._store, rank, world_size, device, deadline_seconds)
        except RuntimeError as problem:
            raise self._error("could not be built", began_seconds) from problem
        if missing:
            raise self._error(f"was not joined by {_ranks(missing)}", began_seconds)

    def send(self, tensors: Iterable[tuple[str, Tensor]], *, version: int, bucket_bytes: int) -> str:
        """Broadcast all tensors to the other ranks, wait until they have them. Returns the digest of what was sent.

        Raises WeightsError when a rank does not take part, stops on the way, or received other bytes.
        """
        began_seconds = time.perf_counter()
        self._push += 1
        receivers = range(1, self._world_size)
        digest, count = 0, 0
        try:
            absent = self._missing_ranks(f"{self._push}/ready", receivers, self._deadline_seconds)
            if absent:
                raise self._error(f"was to send version {version}: {_ranks(absent)} did not answer", began_seconds)
            for bucket in packed(tensors, bucket_bytes=bucket_bytes, device=self._device):
                digest = chained(digest, self._send_bucket(bucket, version))
                count += 1
            self._send_header(version, 0, 0)
            late = self._missing_ranks(f"{self._push}/done", receivers, self._deadline_seconds)
            received = {rank: self._digest_of(rank) for rank in receivers if rank not in late}
        except RuntimeError as problem:
            suspects = self._suspects(receivers)
            raise self._error(
                f"was sending version {version} when {_ranks(suspects)} stopped answering, after {count} buckets",
                began_seconds,
            ) from problem
        if late:
            raise self._error(f"sent version {version}, but {_ranks(late)} did not confirm it", began_seconds)
        sent = f"{digest:016x}"
        if damaged := [rank for rank in receivers if received[rank] != sent]:
            raise WeightsError(
                f"version {version} has digest {sent}, but {_ranks(damaged)} of weight group {self._group} received "
                f"{received[damaged[0]]}: the transfer was damaged. Resume from the last checkpoint; if it happens "
                "again, check the machine's network and memory."
            )
        return sent

    def receive(self, install: Callable[[Iterator[tuple[str, Tensor]]], object]) -> tuple[int, str]:
        """Take part in one broadcast; `install` is called with the named tensors of each bucket, to be copied from.

        Returns the version and the digest of what was received and handed to `install`. Raises WeightsError when rank 0
        does not send, stops on the way, or sends what cannot be weights.
        """
        began_seconds = time.perf_counter()
        self._push += 1
        digest, count, version = 0, 0, -1
        try:
            self._store.set(f"{self._push}/ready/{self._rank}", "")
            while True:
                version, bucket = self._receive_bucket()
                if bucket is None:
                    break
                install(unpacked(bucket))
                digest = chained(digest, checksum(bucket.bytes_N))
                count += 1
                self._store.set(f"{self._push}/buckets/{self._rank}", str(count))
            self._store.set(f"{self._push}/done/{self._rank}", f"{digest:016x}")
        except RuntimeError as problem:
            self._tell_failure()
            what = f"version {version}" if count else f"push {self._push}"
            raise self._error(
                f"got {count} buckets of {what}, then rank 0 (the learner) or a rank before this one stopped answering",
                began_seconds,
            ) from problem
        except WeightsError:
            self._tell_failure()
            raise
        return version, f"{digest:016x}"

    def close(self) -> None:
        """Leave; the other ranks notice at their next operation."""
        self._processes.abort()

    def _send_header(self, version: int, manifest_bytes: int, total_bytes: int) -> None:
        header = [MAGIC, version, manifest_bytes, total_bytes]
        self._broadcast(torch.tensor(header, dtype=torch.int64, device=self._device))

    def _send_bucket(self, bucket: Bucket, version: int) -> int:
        self._send_header(version, bucket.manifest_bytes, len(bucket.bytes_N))
        self._broadcast(bucket.bytes_N)
        return checksum(bucket.bytes_N)

    def _receive_bucket(self) -> tuple[int, Bucket | None]:
        """The version and the next bucket; None after the last."""
        header = torch.zeros(4, dtype=torch.int64, device=self._device)
        self._broadcast(header)
        version, manifest_bytes, total_bytes = checked_header(header.tolist())
        if total_bytes == 0:
            return version, None
        bytes_N = torch.empty(total_bytes, dtype=torch.uint8, device=self._device)
        self._broadcast(bytes_N)
        return version, Bucket(bytes_N, manifest_bytes)

    def _broadcast(self, tensor: Tensor) -> None:
        deadline = timedelta(seconds=self._deadline_seconds)
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = deadline
        self._processes.broadcast([tensor], options).wait(deadline)

    def _missing_ranks(self, what: str, ranks: Iterable[int], wait_seconds: float) -> list[int]:
        keys = {f"{what}/{rank}": rank for rank in ranks}
        return [keys[key] for key in missing_keys(self._store, keys, wait_seconds)]

    def _digest_of(self, rank: int) -> str:
        return str(self._store.get(f"{self._push}/done/{rank}").decode())

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

    def _error(self, happening: str, began_seconds: float) -> WeightsError:
        return WeightsError(
            f"weight group {self._group} (rank {self._rank} of {self._world_size}) {happening}, "
            f"{time.perf_counter() - began_seconds:.1f} s after it began. "
            "Look into the log of the process that is named; raise weights.deadline_seconds if it was only slow."
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
    options._devices = [gloo.create_device(hostname=own_address(address))]
    return gloo(store, rank, world_size, options)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
