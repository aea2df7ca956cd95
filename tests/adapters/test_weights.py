"""Weights arrive whole or not at all, and a missing rank is named within the deadline. Real processes, real gloo."""

import hashlib
import os
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor
from torch.distributed import TCPStore

from azr_async.adapters.weights import WeightGroup, connect_store, give_up, host_store
from azr_async.adapters.weights.buckets import (
    HEAD_BYTES,
    LARGE_BYTES,
    LARGEST_BUCKET_BYTES,
    MAGIC,
    bucketed,
    packed_head,
    parsed_head,
    parts,
    payload,
    unpacked,
)
from azr_async.adapters.weights.memory import BufferMemory
from azr_async.errors import ConfigError, RanksLost, WeightsError

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
        "large": torch.randn(515, 512, generator=generator),
        "large, transposed": torch.randn(512, 520, generator=generator).T,
        "large, not in whole words": torch.randn(1000, 1001, generator=generator).bfloat16()[1:, 1:3],
        "larger than a piece": torch.randn(2**21 + 4, generator=generator),
        "last": torch.randn(3, generator=generator),
    }


def summed(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    """A small and exact picture of the tensors: a sum of floats would depend on where in memory they lie."""
    return {name: (t.dtype, t.shape, fingerprint(t)) for name, t in tensors.items()}


def fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


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
            pipe.send((version, digest, summed(got)))
        group.close()
    except WeightsError as problem:
        pipe.send(str(problem))


def damaging_receiver(pipe: Connection, port: int, damage: Callable[[int, Tensor], None]) -> None:
    """What arrives is other than what was sent: `damage` changes broadcasts, by their number."""
    group = a_group(connect_store("127.0.0.1", port, 20.0), 1, 2)
    end_oldest, numbers = group._broadcasts.end_oldest, count()

    def damaged() -> Tensor:
        bytes_N = end_oldest()
        damage(next(numbers), bytes_N)
        return bytes_N

    group._broadcasts.end_oldest = damaged  # type: ignore[method-assign]
    group.receive(list)
    pipe.send("done")


def flip_a_bit(number: int, bytes_N: Tensor) -> None:
    if number == 2:
        bytes_N[len(bytes_N) // 2] ^= 16


def exchange_words(number: int, bytes_N: Tensor) -> None:
    if number == 1:
        words_W = bytes_N.view(torch.int64)
        words_W[[5, 700]] = words_W[[700, 5]]


def lose_a_piece(number: int, bytes_N: Tensor) -> None:
    if number == 2:
        bytes_N.zero_()


def other_name(number: int, bytes_N: Tensor) -> None:
    if number == 0:
        bytes_N[bytes_N == ord("m")] = ord("n")


def dying_receiver(pipe: Connection, port: int, rank: int, world_size: int, how: int, deadline_seconds: float) -> None:
    """Stops or dies when the third tensor arrives."""
    names: list[str] = []

    def install(tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, _ in tensors:
            names.append(name)
            if len(names) == 3:
                os.kill(os.getpid(), how)

    a_group(connect_store("127.0.0.1", port, deadline_seconds), rank, world_size, deadline_seconds).receive(install)


def failing_sender(pipe: Connection, how: int) -> None:
    """Hosts the store as the learner does; gets a signal in the middle of a push."""

    def streamed() -> Iterator[tuple[str, Tensor]]:
        for n in range(2000):
            if n == 1000:
                os.kill(os.getpid(), how)
            yield f"layer {n}", torch.full((1000,), float(n))

    store = host_store("127.0.0.1", 0)
    pipe.send(store.port)
    a_group(store, 0, 2).send(streamed(), version=1, bucket_bytes=BUCKET_BYTES)


def full_receiver(pipe: Connection, port: int, rank: int, world_size: int) -> None:
    """Has no room for what arrives, and waits to be ended."""

    def install(tensors: Iterable[tuple[str, Tensor]]) -> None:
        raise torch.OutOfMemoryError("no room here")

    try:
        a_group(connect_store("127.0.0.1", port, 20.0), rank, world_size).receive(install)
    except RuntimeError as problem:
        pipe.send(f"{type(problem).__name__}: {problem}")
    pipe.poll(30.0)


def late_receiver(pipe: Connection, port: int) -> None:
    """Takes part only when it is told to."""
    group = a_group(connect_store("127.0.0.1", port, 20.0), 1, 2)
    pipe.send("joined")
    pipe.recv()
    pipe.send(group.receive(list))
    group.close()


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
            digests.append(group.send(weights.items(), version=version, bucket_bytes=BUCKET_BYTES).digest)
            expected = summed(weights)
            assert answer(first) == (version, digests[-1], expected)
            assert answer(second) == (version, digests[-1], expected)
        assert digests[0] != digests[1]
        group.close()


@pytest.mark.parametrize("damage", [flip_a_bit, exchange_words, lose_a_piece, other_name])
def test_other_bytes_than_were_sent_are_found_and_the_rank_is_named(damage: Callable[[int, Tensor], None]) -> None:
    store = host_store("127.0.0.1", 0)
    with process(damaging_receiver, store.port, damage):
        group = a_group(store, 0, 2)
        with pytest.raises(WeightsError, match=r"but rank 1 of weight group 1 received [0-9a-f]{32}: .* damaged"):
            group.send(some_weights(1).items(), version=1, bucket_bytes=2**30)
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
        with pytest.raises(RanksLost) as error:
            group.send(many, version=5, bucket_bytes=BUCKET_BYTES)
        assert error.value.ranks == (1,)
        assert "stopped answering" in str(answer(other))
        group.close()


def test_a_rank_that_comes_late_but_in_time_is_waited_for() -> None:
    store = host_store("127.0.0.1", 0)
    with process(late_receiver, store.port) as late, ThreadPoolExecutor(1) as sending:
        group = a_group(store, 0, 2)
        answer(late)
        sent = sending.submit(group.send, some_weights(1).items(), version=4, bucket_bytes=BUCKET_BYTES)
        with pytest.raises(TimeoutError):
            sent.result(timeout=1.5)  # longer than the sender waits at a time
        late.send("take part")
        assert answer(late) == (4, sent.result(timeout=20.0).digest)
        group.close()


def test_a_receiver_whose_sender_dies_on_the_way_says_so_within_the_deadline() -> None:
    with process(failing_sender, int(signal.SIGKILL)) as sender:
        group = a_group(connect_store("127.0.0.1", int(str(answer(sender))), 20.0), 1, 2, deadline_seconds=3.0)
        began_seconds = time.perf_counter()
        with pytest.raises(RanksLost, match=r"version 1, then rank 0 \(the learner\) .* stopped answering"):
            group.receive(list)
        assert time.perf_counter() - began_seconds < 3.0 + 3.0
        group.close()


def test_the_sender_knows_how_much_it_sent_and_how_long_it_took() -> None:
    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 2, 1, 20.0) as only:
        group = a_group(store, 0, 2)
        sent = group.send(some_weights(1).items(), version=1, bucket_bytes=BUCKET_BYTES)
        assert answer(only) == (1, sent.digest, summed(some_weights(1)))
        assert sent.seconds > 0
        assert sent.size_bytes >= sum(tensor.nbytes for tensor in some_weights(1).values())
        group.close()


def test_what_fails_in_the_sender_is_no_lost_rank_and_nobody_waits_for_the_rest() -> None:
    def streamed() -> Iterator[tuple[str, Tensor]]:
        yield "first", torch.zeros(2000)
        raise torch.OutOfMemoryError("no room to put the shards together")

    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 2, 1, 20.0) as only:
        group = a_group(store, 0, 2)
        began_seconds = time.perf_counter()
        with pytest.raises(torch.OutOfMemoryError, match="put the shards together"):
            group.send(streamed(), version=1, bucket_bytes=BUCKET_BYTES)
        assert "was given up: rank 0 (the learner)" in str(answer(only))
        assert time.perf_counter() - began_seconds < 10.0
        group.close()


def test_what_fails_in_a_receiver_is_its_own_error_and_no_healthy_rank_is_named() -> None:
    store = host_store("127.0.0.1", 0)
    many = ((f"layer {n}", torch.full((1000,), float(n))) for n in range(2000))
    with process(receiver, store.port, 1, 3, 1, 20.0) as well, process(full_receiver, store.port, 2, 3) as full:
        group = a_group(store, 0, 3)
        began_seconds = time.perf_counter()
        with pytest.raises(RanksLost, match="when a rank stopped answering") as error:
            group.send(many, version=1, bucket_bytes=BUCKET_BYTES)
        assert error.value.ranks == ()
        assert answer(full) == "OutOfMemoryError: no room here"
        assert "stopped answering" in str(answer(well))
        assert time.perf_counter() - began_seconds < 10.0
        group.close()


def test_nobody_waits_longer_for_a_rank_that_is_known_to_be_gone() -> None:
    store, lost = host_store("127.0.0.1", 0), list[int]()
    many = ((f"layer {n}", torch.full((1000,), float(n))) for n in range(2000))
    with process(dying_receiver, store.port, 1, 2, int(signal.SIGSTOP), 20.0):
        group = WeightGroup(
            store, group=1, rank=0, world_size=2, device=CPU, deadline_seconds=20.0, known_lost=lambda: lost
        )
        lost.append(1)
        began_seconds = time.perf_counter()
        with pytest.raises(RanksLost) as error:
            group.send(many, version=5, bucket_bytes=BUCKET_BYTES)
        assert error.value.ranks == (1,)
        assert time.perf_counter() - began_seconds < 10.0
        group.close()


@pytest.mark.parametrize("is_built", [False, True])
def test_nobody_waits_in_a_group_that_was_given_up(is_built: bool) -> None:
    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 2, 1, 20.0) as only:
        group = a_group(store, 0, 2) if is_built else None
        began_seconds = time.perf_counter()
        give_up(store, 1)
        assert "(rank 1 of 2) was given up: rank 0 (the learner)" in str(answer(only))
        assert time.perf_counter() - began_seconds < 10.0
        if group is not None:
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
        digest = group.send(some_weights(1).items(), version=1, bucket_bytes=BUCKET_BYTES).digest
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


def sent_and_unpacked(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> list[list[tuple[str, Tensor]]]:
    """By bucket, as it goes over the wire: the head, the payload, back."""
    memory, buckets = BufferMemory(CPU), []
    for bucket in bucketed(tensors, version=3, bucket_bytes=bucket_bytes):
        head = parsed_head(packed_head(bucket))
        sent = list(payload(bucket, memory))
        bytes_N = torch.cat([torch.empty(0, dtype=torch.uint8), *sent])
        assert head == bucket.head
        assert len(bytes_N) == head.total_bytes
        assert list(map(len, parts(head, bytes_N))) == list(map(len, sent))
        assert all(len(part_N) % 8 == 0 for part_N in sent)
        buckets.append(list(unpacked(head, bytes_N)))
    return buckets


shapes = some.lists(some.integers(0, 9), max_size=3).map(tuple)
large_shapes = some.sampled_from([(LARGE_BYTES // 4,), (LARGE_BYTES // 4 + 1,), (512, 1024), (0, LARGE_BYTES)])


@given(
    sizes=some.lists(shapes, max_size=12),
    larger=some.lists(large_shapes, max_size=2),
    bucket_bytes=some.integers(1, 2000),
    seed=some.integers(0, 99),
)
def test_packing_and_unpacking_gives_everything_back(
    sizes: list[tuple[int, ...]], larger: list[tuple[int, ...]], bucket_bytes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = {f"name {n}": torch.randn(shape) for n, shape in enumerate([*larger, *sizes])}
    buckets = sent_and_unpacked(tensors.items(), bucket_bytes)
    back = dict(pair for bucket in buckets for pair in bucket)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_large_tensors_are_sent_from_where_they_are() -> None:
    tensors = [("small", torch.randn(3)), ("large", torch.randn(LARGE_BYTES)), ("also small", torch.randn(3))]
    (bucket,) = bucketed(tensors, version=1, bucket_bytes=LARGE_BYTES * 5)
    packed, large = payload(bucket, BufferMemory(CPU))
    assert len(packed) == 32
    assert large.data_ptr() == tensors[1][1].data_ptr()


def test_only_two_buckets_of_a_stream_are_held_at_a_time() -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def streamed() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for n in range(12):
            tensor = torch.full((LARGE_BYTES // 4,), float(n))
            made.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in made))
            yield f"layer {n}", tensor

    store = host_store("127.0.0.1", 0)
    with process(receiver, store.port, 1, 2, 1, 20.0) as only:
        group = a_group(store, 0, 2)
        group.send(streamed(), version=1, bucket_bytes=2 * LARGE_BYTES)
        answer(only)
        group.close()
    assert most <= 2 * 2 + 1


def test_memory_is_lent_again_only_when_no_view_of_it_is_left() -> None:
    memory = BufferMemory(CPU)
    first = memory.take(2**21)
    kept, place = first[10:20].view(5, 2), first.data_ptr()
    kept.fill_(7)
    del first
    others = [memory.take(2**21) for _ in range(5)]
    assert place not in [other.data_ptr() for other in others]
    assert kept.tolist() == [[7, 7]] * 5
    del kept
    assert memory.take(2**21 - 100).data_ptr() == place


def test_tied_parameters_are_sent_once() -> None:
    shared = torch.randn(8, 4)
    tensors = [("embedding", shared), ("head", shared), ("copy", shared.clone())]
    (bucket,) = sent_and_unpacked(tensors, 10_000)
    assert [name for name, _ in bucket] == ["embedding", "copy"]


def test_streamed_tensors_that_reuse_memory_are_all_sent() -> None:
    streamed = ((f"layer {n}", torch.full((1000,), float(n))) for n in range(50))
    buckets = sent_and_unpacked(streamed, 1)
    assert [float(tensor[0]) for bucket in buckets for _, tensor in bucket] == list(range(50))


def test_a_bucket_holds_no_more_tensors_than_its_head_can_name() -> None:
    tensors = {"n" * 100 + str(n): torch.full((1,), float(n)) for n in range(1000)}
    buckets = sent_and_unpacked(tensors.items(), 10**9)
    assert len(buckets) > 1
    assert [float(tensor) for bucket in buckets for _, tensor in bucket] == list(range(1000))


def test_a_name_that_comes_twice_is_refused() -> None:
    tensors = [("a", torch.ones(1)), ("a", torch.zeros(1))]
    with pytest.raises(WeightsError, match="twice"):
        list(bucketed(tensors, version=1, bucket_bytes=100))


def test_a_name_that_does_not_fit_into_a_head_is_refused() -> None:
    (bucket,) = bucketed([("n" * HEAD_BYTES, torch.ones(1))], version=1, bucket_bytes=100)
    with pytest.raises(WeightsError, match="too long"):
        packed_head(bucket)


@given(place=some.integers(0, 500), noise=some.binary(min_size=1, max_size=40))
def test_a_damaged_head_is_refused_or_read_but_never_crashes(place: int, noise: bytes) -> None:
    (bucket,) = bucketed(some_weights(0).items(), version=1, bucket_bytes=2**30)
    head_N = packed_head(bucket)
    head_N[place : place + len(noise)] = torch.frombuffer(bytearray(noise), dtype=torch.uint8)
    with suppress(WeightsError):
        assert 0 <= parsed_head(head_N).total_bytes <= LARGEST_BUCKET_BYTES


@given(integers=some.lists(some.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4), begins_well=some.booleans())
def test_a_head_of_noise_is_refused(integers: list[int], begins_well: bool) -> None:
    head_N = torch.zeros(HEAD_BYTES, dtype=torch.uint8)
    head_N[:32] = torch.tensor([MAGIC, *integers[1:]] if begins_well else integers).view(torch.uint8)
    with pytest.raises(WeightsError, match="malformed"):
        parsed_head(head_N)
