"""Weights arrive whole or not at all, and a missing rank is named within the deadline. Real processes, real gloo."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor
from torch.distributed import TCPStore

from azr_async.adapters.weights import WeightGroup, connect_store, host_store
from azr_async.adapters.weights.buckets import MAGIC, Bucket, checked_header, packed, unpacked
from azr_async.errors import ConfigError, WeightsError

CPU = torch.device("cpu")
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["azr_async.adapters.weights"])
BUCKET_BYTES = 4096


def some_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(300, 7, generator=generator),
        "half": torch.randn(5, 5, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "nothing": torch.zeros(0, 3),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.arange(3) + seed,
        "transposed": torch.randn(4, 6, generator=generator).T,
    }


def a_group(store: TCPStore, rank: int, world_size: int, deadline_seconds: float = 20.0, group: int = 1) -> WeightGroup:
    return WeightGroup(
        store, group=group, rank=rank, world_size=world_size, device=CPU, deadline_seconds=deadline_seconds
    )


def receiver(pipe: Connection, port: int, rank: int, world_size: int, pushes: int, deadline_seconds: float) -> None:
    """In a process of its own: tell of every push what came, or which error."""
    torch.set_num_threads(1)
    try:
        group = a_group(connect_store("127.0.0.1", port, deadline_seconds), rank, world_size, deadline_seconds)
        for _ in range(pushes):
            got: dict[str, Tensor] = {}
            version, digest = group.receive(got.update)
            pipe.send((version, digest, {name: tensor.float().tolist() for name, tensor in got.items()}))
        group.close()
    except WeightsError as problem:
        pipe.send(str(problem))


def damaging_receiver(pipe: Connection, port: int) -> None:
    """Its memory loses what it has received."""

    def lose(tensors: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in tensors:
            tensor.zero_()

    a_group(connect_store("127.0.0.1", port, 20.0), 1, 2).receive(lose)
    pipe.send("done")


def dying_receiver(pipe: Connection, port: int, rank: int, world_size: int, how: int, deadline_seconds: float) -> None:
    """Stops or dies when the third tensor arrives."""
    names: list[str] = []

    def install(tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, _ in tensors:
            names.append(name)
            if len(names) == 3:
                os.kill(os.getpid(), how)

    a_group(connect_store("127.0.0.1", port, deadline_seconds), rank, world_size, deadline_seconds).receive(install)


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    here, there = FORKS.Pipe()
    child: BaseProcess = FORKS.Process(target=target, args=(there, *arguments))
    child.start()
    try:
        yield here
    finally:
        child.kill()
        child.join()
        child.close()
        here.close()
        there.close()


def answer(pipe: Connection) -> object:
    assert pipe.poll(30.0)
    return pipe.recv()


def greet(pipe: Connection) -> None:
    pipe.send("hello")


@pytest.fixture(scope="module", autouse=True)
def _warm_processes() -> None:
    """The first child waits until torch is loaded; the others, and so the short deadlines below, do not."""
    with process(greet) as pipe:
        answer(pipe)


def test_all_ranks_get_what_was_sent_under_the_senders_digest() -> None:
    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 3, 2, 20.0) as first, process(receiver, store.port, 2, 3, 2, 20.0) as second:
        group = a_group(store, 0, 3)
        digests = []
        for version in (7, 8):
            weights = some_weights(version)
            digests.append(group.send(weights.items(), version=version, bucket_bytes=BUCKET_BYTES))
            expected = {name: tensor.float().tolist() for name, tensor in weights.items()}
            assert answer(first) == (version, digests[-1], expected)
            assert answer(second) == (version, digests[-1], expected)
        assert digests[0] != digests[1]
        group.close()


def test_other_bytes_than_were_sent_are_found_and_the_rank_is_named() -> None:
    store = host_store("127.0.0.1", 0)
    with process(damaging_receiver, store.port):
        group = a_group(store, 0, 2)
        with pytest.raises(WeightsError, match=r"but rank 1 of weight group 1 received [0-9a-f]{16}: .* damaged"):
            group.send(some_weights(1).items(), version=1, bucket_bytes=BUCKET_BYTES)
        group.close()


def test_a_rank_that_does_not_join_is_named() -> None:
    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 3, 1, 1.0) as first:
        with pytest.raises(WeightsError, match=r"was not joined by rank 2"):
            a_group(store, 0, 3, deadline_seconds=3.0)
        assert "was not joined by rank" in str(answer(first))


def test_a_rank_that_does_not_take_part_is_named() -> None:
    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 3, 2, 20.0) as first, process(receiver, store.port, 2, 3, 1, 20.0) as second:
        group = a_group(store, 0, 3, deadline_seconds=3.0)
        group.send(some_weights(1).items(), version=1, bucket_bytes=BUCKET_BYTES)
        answer(first), answer(second)
        with pytest.raises(WeightsError, match=r"version 2: rank 2 did not answer") as error:
            group.send(some_weights(2).items(), version=2, bucket_bytes=BUCKET_BYTES)
        assert "3." in str(error.value)
        group.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_on_the_way_is_named_within_the_deadline(how: int) -> None:
    store = host_store("127.0.0.1", 0)
    many = ((f"layer {n}", torch.full((1000,), float(n))) for n in range(2000))
    with process(dying_receiver, store.port, 1, 2, int(how), 20.0):
        group = a_group(store, 0, 2, deadline_seconds=3.0)
        began_seconds = time.perf_counter()
        with pytest.raises(WeightsError, match=r"version 5 when rank 1 stopped answering"):
            group.send(many, version=5, bucket_bytes=BUCKET_BYTES)
        assert time.perf_counter() - began_seconds < 3.0 + 3.0
        group.close()


def test_receivers_do_not_hang_when_another_rank_dies() -> None:
    store = host_store("127.0.0.1", 0)
    many = ((f"layer {n}", torch.full((1000,), float(n))) for n in range(2000))
    with (
        process(dying_receiver, store.port, 1, 3, int(signal.SIGKILL), 20.0),
        process(receiver, store.port, 2, 3, 1, 4.0) as other,
    ):
        group = a_group(store, 0, 3, deadline_seconds=4.0)
        with pytest.raises(WeightsError, match=r"rank"):
            group.send(many, version=5, bucket_bytes=BUCKET_BYTES)
        assert "stopped answering" in str(answer(other))
        group.close()


def test_a_receiver_without_a_sender_gives_up_in_time() -> None:
    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 2, 1, 1.5) as only:
        group = a_group(store, 0, 2)
        assert "rank 0 (the learner)" in str(answer(only))
        group.close()


def test_a_new_group_on_the_same_store_replaces_a_lost_one() -> None:
    store = host_store("127.0.0.1", 0)
    with pytest.raises(WeightsError):
        a_group(store, 0, 2, deadline_seconds=0.2, group=0)
    with process(receiver, store.port, 1, 2, 1, 20.0) as only:
        group = a_group(store, 0, 2)
        digest = group.send(some_weights(1).items(), version=1, bucket_bytes=BUCKET_BYTES)
        version, received_digest, _ = answer(only)  # type: ignore[misc]
        assert (version, received_digest) == (1, digest)
        group.close()


def test_a_port_in_use_is_a_configuration_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .* set weights.port"):
            host_store("127.0.0.1", port)


def test_the_store_listens_on_its_own_address_only() -> None:
    store = host_store("127.0.0.1", 0)
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", store.port))


def test_a_store_that_is_not_there_is_an_error_with_its_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(WeightsError, match=rf"127.0.0.1:{port} did not answer"):
        connect_store("127.0.0.1", port, 0.2)


shapes = some.lists(some.integers(0, 9), max_size=3).map(tuple)


@given(sizes=some.lists(shapes, max_size=12), bucket_bytes=some.integers(1, 2000), seed=some.integers(0, 99))
def test_packing_and_unpacking_gives_everything_back(
    sizes: list[tuple[int, ...]], bucket_bytes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = {f"name {n}": torch.randn(shape) for n, shape in enumerate(sizes)}
    buckets = list(packed(tensors.items(), bucket_bytes=bucket_bytes, device=CPU))
    back = dict(pair for bucket in buckets for pair in unpacked(bucket))
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_tied_parameters_are_sent_once() -> None:
    shared = torch.randn(8, 4)
    tensors = [("embedding", shared), ("head", shared), ("copy", shared.clone())]
    (bucket,) = packed(tensors, bucket_bytes=10_000, device=CPU)
    assert [name for name, _ in unpacked(bucket)] == ["embedding", "copy"]


def test_streamed_tensors_that_reuse_memory_are_all_sent() -> None:
    streamed = ((f"layer {n}", torch.full((1000,), float(n))) for n in range(50))
    buckets = packed(streamed, bucket_bytes=1, device=CPU)
    assert [float(tensor[0]) for bucket in buckets for _, tensor in unpacked(bucket)] == list(range(50))


def test_a_name_that_comes_twice_is_refused() -> None:
    tensors = [("a", torch.ones(1)), ("a", torch.zeros(1))]
    with pytest.raises(WeightsError, match="twice"):
        list(packed(tensors, bucket_bytes=100, device=CPU))


@given(data=some.data(), noise=some.binary(min_size=1, max_size=40))
def test_a_damaged_buffer_is_refused_or_read_but_never_crashes(data: some.DataObject, noise: bytes) -> None:
    (bucket,) = packed(some_weights(0).items(), bucket_bytes=100_000, device=CPU)
    place = data.draw(some.integers(0, bucket.manifest_bytes))
    bytes_N = bucket.bytes_N.clone()
    bytes_N[place : place + len(noise)] = torch.frombuffer(bytearray(noise), dtype=torch.uint8)
    with suppress(WeightsError):
        list(unpacked(Bucket(bytes_N, bucket.manifest_bytes)))


@given(header=some.lists(some.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4), begins_well=some.booleans())
def test_a_header_is_refused_before_its_bytes_are_allocated(header: list[int], begins_well: bool) -> None:
    with suppress(WeightsError):
        version, manifest_bytes, total_bytes = checked_header([MAGIC, *header[1:]] if begins_well else header)
        assert version >= 0
        assert 0 <= manifest_bytes <= 2**24
        assert manifest_bytes <= total_bytes <= 2**36
