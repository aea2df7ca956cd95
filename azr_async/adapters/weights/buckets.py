"""Named tensors in buckets: what is in one (its head), and where in its bytes each tensor lies.

A head has a fixed size: four integers - MAGIC, the version, the bytes of the manifest, whether this is the last one -
and then a MessagePack manifest, a list of [name, type, shape]. From it both sides know the layout: first the small
tensors in their order, then the large ones. Every tensor starts at a multiple of 16 bytes, as typed views need.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
import numpy as np
import torch
from torch import Tensor

from azr_async.adapters.weights.memory import BufferMemory
from azr_async.errors import WeightsError

MAGIC: Final = 0x415A5258
"""What every head begins with."""

HEAD_BYTES: Final = 2**14
LARGEST_BUCKET_BYTES: Final = 2**36
LARGE_BYTES: Final = 2**20
"""Tensors from this size on are sent from where they are; smaller ones are packed first."""
RUN_BYTES: Final = 2**23
"""So much is packed at a time."""

_INTEGERS: Final = 4
_MANIFEST_START: Final = _INTEGERS * 8
_LIST_BYTES: Final = 5
"""The most that MessagePack adds for the list around the entries."""
_ALIGNMENT: Final = 16
_TYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size_bytes: int = field(init=False)
    """Without padding. Kept, as `is_large` is: a push asks for them thousands of times."""
    is_large: bool = field(init=False)
    """Sent as it is; for that it has to need no padding."""

    def __post_init__(self) -> None:
        size_bytes = math.prod(self.shape) * self.dtype.itemsize
        object.__setattr__(self, "size_bytes", size_bytes)
        object.__setattr__(self, "is_large", size_bytes >= LARGE_BYTES and size_bytes == aligned(size_bytes))


@dataclass(frozen=True, slots=True)
class Head:
    """What a bucket holds."""

    version: int
    is_last: bool
    entries: tuple[Entry, ...]

    @property
    def small_bytes(self) -> int:
        """All small tensors, padded; they come first."""
        return sum(aligned(entry.size_bytes) for entry in self.entries if not entry.is_large)

    @property
    def small_runs(self) -> list[list[int]]:
        """Indices of small tensors that are packed together."""
        runs: list[list[int]] = []
        run_bytes = 0
        for index, entry in enumerate(self.entries):
            if not entry.is_large:
                run_bytes += aligned(entry.size_bytes)
                if not runs or run_bytes > RUN_BYTES:
                    runs.append([])
                    run_bytes = aligned(entry.size_bytes)
                runs[-1].append(index)
        return runs

    def run_bytes(self, run: Iterable[int]) -> int:
        """Of these tensors, padded."""
        return sum(aligned(self.entries[index].size_bytes) for index in run)

    @property
    def total_bytes(self) -> int:
        """The whole bucket."""
        return sum(aligned(entry.size_bytes) for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is to be sent together."""

    tensors: tuple[tuple[str, Tensor], ...]
    head: Head


def aligned(size_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def bucketed(tensors: Iterable[tuple[str, Tensor]], *, version: int, bucket_bytes: int) -> Iterator[Bucket]:
    """Buckets of at most `bucket_bytes`; a larger tensor gets a bucket of its own. Copies nothing.

    A tensor that is the same memory as one sent before (tied parameters) is left out. Always at least one bucket.
    """
    waiting: list[tuple[str, Tensor]] = []
    waiting_bytes, manifest_bytes = 0, _LIST_BYTES
    for name, tensor in _untied(tensors):
        size_bytes, entry_bytes = aligned(tensor.nbytes), len(msgpack.packb(_described(name, tensor)))
        if waiting and (
            waiting_bytes + size_bytes > bucket_bytes or manifest_bytes + entry_bytes > HEAD_BYTES - _MANIFEST_START
        ):
            yield _bucket(waiting, version, is_last=False)
            waiting, waiting_bytes, manifest_bytes = [], 0, _LIST_BYTES
        waiting.append((name, tensor))
        waiting_bytes += size_bytes
        manifest_bytes += entry_bytes
    yield _bucket(waiting, version, is_last=True)


def packed_head(bucket: Bucket) -> Tensor:
    """[HEAD_BYTES] uint8. Raises WeightsError when the bucket cannot be described or is too large."""
    manifest: bytes = msgpack.packb([_described(name, tensor) for name, tensor in bucket.tensors])
    total_bytes = bucket.head.total_bytes
    if _MANIFEST_START + len(manifest) > HEAD_BYTES or total_bytes > LARGEST_BUCKET_BYTES:
        raise WeightsError(
            f"{bucket.tensors[0][0][:100]} cannot be sent: its name or shape is too long, or a bucket of {total_bytes} "
            "bytes too large. Send the parameters of a model, in buckets of some megabytes (weights.bucket_mb)."
        )
    head = np.zeros(HEAD_BYTES, np.uint8)
    integers = [MAGIC, bucket.head.version, len(manifest), int(bucket.head.is_last)]
    head[:_MANIFEST_START] = np.array(integers, "<i8").view(np.uint8)
    head[_MANIFEST_START : _MANIFEST_START + len(manifest)] = np.frombuffer(manifest, np.uint8)
    return torch.from_numpy(head)


def payload(bucket: Bucket, memory: BufferMemory) -> Iterator[Tensor]:
    """The bytes of the bucket as [N] uint8, on the device of `memory`: runs of small tensors, then each large one.

    Large tensors are not copied unless they lie elsewhere or with gaps, and then one at a time.
    """
    for run in bucket.head.small_runs:
        packed_N = memory.take(bucket.head.run_bytes(run))
        start = 0
        for index in run:
            tensor = bucket.tensors[index][1].detach()
            end = start + tensor.nbytes
            packed_N[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            start += aligned(tensor.nbytes)
            if end < start:
                packed_N[end:start] = 0
        yield packed_N
    for entry, (_, tensor) in zip(bucket.head.entries, bucket.tensors, strict=True):
        if entry.is_large:
            flat_N = tensor.detach().to(memory.device).contiguous().view(-1)
            # The checksum reads words of 8 bytes; torch views a tensor as such only from a multiple of 8 on.
            yield (flat_N if _is_at_word(flat_N) else flat_N.clone()).view(torch.uint8)


def parsed_head(head_N: Tensor) -> Head:
    """What the [HEAD_BYTES] uint8 of a head say. Raises WeightsError before anything is allocated for it."""
    head = bytes(head_N.cpu().numpy())
    magic, version, manifest_bytes, is_last = (int(value) for value in np.frombuffer(head, "<i8", _INTEGERS))
    if magic != MAGIC or version < 0 or is_last not in (0, 1):
        raise malformed("it does not begin as one")
    if not 0 < manifest_bytes <= HEAD_BYTES - _MANIFEST_START:
        raise malformed(f"a manifest of {manifest_bytes} bytes")
    entries = _checked_manifest(head[_MANIFEST_START : _MANIFEST_START + manifest_bytes])
    parsed = Head(version, bool(is_last), entries)
    if parsed.total_bytes > LARGEST_BUCKET_BYTES:
        raise malformed(f"a bucket of {parsed.total_bytes} bytes")
    return parsed


def parts(head: Head, bytes_N: Tensor) -> Iterator[Tensor]:
    """Where what `payload` gives on the other side belongs."""
    start = 0
    for run in head.small_runs:
        yield bytes_N[start : start + head.run_bytes(run)]
        start += head.run_bytes(run)
    for entry in head.entries:
        if entry.is_large:
            yield bytes_N[start : start + entry.size_bytes]
            start += entry.size_bytes


def unpacked(head: Head, bytes_N: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of its bytes, [head.total_bytes] uint8."""
    small, large = 0, head.small_bytes
    for entry in head.entries:
        start = large if entry.is_large else small
        yield entry.name, bytes_N[start : start + entry.size_bytes].view(entry.dtype).view(entry.shape)
        if entry.is_large:
            large += entry.size_bytes
        else:
            small += aligned(entry.size_bytes)


def malformed(reason: str) -> WeightsError:
    """The error for bytes that cannot be weights."""
    return WeightsError(f"a weights message is malformed: {reason}. Run the same version of azr_async on every host.")


def _described(name: str, tensor: Tensor) -> list[Any]:
    return [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _bucket(tensors: list[tuple[str, Tensor]], version: int, *, is_last: bool) -> Bucket:
    entries = tuple(Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors)
    return Bucket(tuple(tensors), Head(version, is_last, entries))


def _is_at_word(flat_N: Tensor) -> bool:
    return flat_N.storage_offset() * flat_N.itemsize % 8 == 0


def _untied(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each name once, and of tensors that share their memory only the first."""
    names: set[str] = set()
    # By weak reference: memory of a tensor that has gone may be another tensor's by now.
    seen: dict[tuple[int, torch.Size, torch.dtype], weakref.ref[Tensor]] = {}
    for name, tensor in tensors:
        if name in names or str(tensor.dtype).removeprefix("torch.") not in _TYPES:
            raise WeightsError(
                f"{name} of type {tensor.dtype} cannot be sent: the type is not supported, or the name came twice. "
                "Send the parameters of one model, as named_parameters() gives them."
            )
        names.add(name)
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        earlier = seen.get(place)
        if tensor.numel() and earlier is not None and earlier() is not None:
            continue
        seen[place] = weakref.ref(tensor)
        yield name, tensor


def _checked_manifest(manifest: bytes) -> tuple[Entry, ...]:
    try:
        entries: Any = msgpack.unpackb(manifest, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as problem:
        raise malformed("the manifest cannot be read") from problem
    if not isinstance(entries, list):
        raise malformed("the manifest is not a list")
    checked = []
    for entry in entries:
        match entry:
            case [str() as name, str() as kind, list() as shape] if kind in _TYPES and all(
                type(size) is int and 0 <= size <= LARGEST_BUCKET_BYTES for size in shape
            ):
                checked.append(Entry(name, _TYPES[kind], tuple(shape)))
            case _:
                raise malformed("an entry of the manifest is not a name, a type and a shape")
    return tuple(checked)
