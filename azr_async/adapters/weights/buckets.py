"""Named tensors packed into flat buffers of bytes, and back.

A buffer is a MessagePack manifest, a list of [name, type, shape], and then the tensors' bytes in that order. Every part
starts at a multiple of 16 bytes, as typed views need.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import numpy as np
import torch
from torch import Tensor

from azr_async.errors import WeightsError

MAGIC: Final = 0x415A5257
"""What every header begins with."""

LARGEST_MANIFEST_BYTES: Final = 2**24
LARGEST_PAYLOAD_BYTES: Final = 2**36
_ALIGNMENT: Final = 16
_TYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """One buffer on its way."""

    bytes_N: Tensor
    """[N] uint8, manifest and payload, both padded."""
    manifest_bytes: int
    """Of the manifest, without padding."""


def aligned(size_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def packed(tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int, device: torch.device) -> Iterator[Bucket]:
    """Buckets of at most `bucket_bytes` of payload; a larger tensor gets a bucket of its own.

    A tensor that is the same memory as one sent before (tied parameters) is left out. Always at least one bucket.
    """
    waiting: list[tuple[str, Tensor]] = []
    waiting_bytes = 0
    for name, tensor in _untied(tensors):
        size_bytes = aligned(tensor.nbytes)
        if waiting and waiting_bytes + size_bytes > bucket_bytes:
            yield _packed_bucket(waiting, device)
            waiting, waiting_bytes = [], 0
        waiting.append((name, tensor))
        waiting_bytes += size_bytes
    yield _packed_bucket(waiting, device)


def checked_header(header: list[int]) -> tuple[int, int, int]:
    """Version, manifest bytes and total bytes, if they can be true; zero bytes in all is the end of a version.

    Raises WeightsError before anything is allocated for them.
    """
    magic, version, manifest_bytes, total_bytes = header
    if magic != MAGIC or version < 0:
        raise malformed("it does not begin as one")
    is_end = manifest_bytes == total_bytes == 0
    is_bucket = (
        0 < manifest_bytes <= LARGEST_MANIFEST_BYTES
        and aligned(manifest_bytes) <= total_bytes <= LARGEST_PAYLOAD_BYTES
        and total_bytes == aligned(total_bytes)
    )
    if not is_end and not is_bucket:
        raise malformed(f"a bucket of {total_bytes} bytes, {manifest_bytes} of them manifest")
    return version, manifest_bytes, total_bytes


def unpacked(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors, as views into the buffer. Raises WeightsError before the first when the buffer is malformed."""
    manifest = bytes(bucket.bytes_N[: bucket.manifest_bytes].cpu().numpy())
    entries = _checked_manifest(manifest)
    start = aligned(bucket.manifest_bytes)
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in entries]
    if start + sum(map(aligned, sizes)) != len(bucket.bytes_N):
        raise malformed("the buffer does not hold what its manifest names")
    for (name, dtype, shape), size_bytes in zip(entries, sizes, strict=True):
        yield name, bucket.bytes_N[start : start + size_bytes].view(dtype).view(shape)
        start += aligned(size_bytes)


def malformed(reason: str) -> WeightsError:
    """The error for bytes that cannot be weights."""
    return WeightsError(f"a weights message is malformed: {reason}. Run the same version of azr_async on every host.")


def _packed_bucket(tensors: list[tuple[str, Tensor]], device: torch.device) -> Bucket:
    entries = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors]
    manifest: bytes = msgpack.packb(entries)
    start = aligned(len(manifest))
    total = start + sum(aligned(tensor.nbytes) for _, tensor in tensors)
    if len(manifest) > LARGEST_MANIFEST_BYTES or total > LARGEST_PAYLOAD_BYTES:
        raise WeightsError(f"a bucket of {total} bytes cannot be sent. Lower weights.bucket_mb.")
    bytes_N = torch.zeros(total, dtype=torch.uint8, device=device)
    bytes_N[: len(manifest)] = torch.from_numpy(np.frombuffer(manifest, np.uint8).copy())
    for _, tensor in tensors:
        bytes_N[start : start + tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        start += aligned(tensor.nbytes)
    return Bucket(bytes_N, len(manifest))


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


def _checked_manifest(manifest: bytes) -> list[tuple[str, torch.dtype, list[int]]]:
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
                type(size) is int and 0 <= size <= LARGEST_PAYLOAD_BYTES for size in shape
            ):
                checked.append((name, _TYPES[kind], shape))
            case _:
                raise malformed("an entry of the manifest is not a name, a type and a shape")
    return checked
