"""The receiver's half of the protocol by itself: credits are exact, and no frames can upset it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_async.adapters.channels import protocol
from azr_async.adapters.channels.roll import Frames, Roll, Terms
from azr_async.errors import PeerVanished


def roll_with(capacity: int) -> Roll:
    terms = Terms(
        name="requests",
        capacity=capacity,
        expected_senders=1,
        join_seconds=None,
        heartbeat_seconds=1.0,
        peer_timeout_seconds=3.0,
        limit_bytes=100,
    )
    return Roll(terms, "ipc:///tmp/s")


def said(*frames: bytes) -> list[bytes]:
    return list(protocol.sealed(*frames))


def data(number: int, payload: bytes) -> list[bytes]:
    return said(protocol.DATA, protocol.number_frame(number), payload)


def last_allowance(told: list[Frames], so_far: int) -> int:
    return max([so_far, *(protocol.read_number(frames[2]) for frames in told if len(frames) > 3)])


@given(capacity=st.integers(1, 9), moves=st.lists(st.booleans(), max_size=100))
@settings(deadline=None)
def test_a_sender_is_out_of_credit_exactly_when_as_many_as_fit_are_unread(capacity: int, moves: list[bool]) -> None:
    """A move is either a message that the sender has credit for, or the consumer taking one that is there."""
    roll = roll_with(capacity)
    sent = 0
    allowed = last_allowance(roll.hear(b"id", said(protocol.HELLO, b"learner")), 0)
    for is_send in moves:
        if is_send and sent < allowed:
            sent += 1
            allowed = last_allowance(roll.hear(b"id", data(sent, b"")), allowed)
        elif not is_send and roll.arrived:
            arrival = roll.arrived.popleft()
            assert isinstance(arrival, tuple)
            allowed = last_allowance(roll.taken(arrival[0]), allowed)
        assert len(roll.arrived) <= capacity
        assert (sent == allowed) == (len(roll.arrived) == capacity)
    assert roll.refused == 0


words = st.sampled_from([protocol.HELLO, protocol.DATA, protocol.BEAT, protocol.CLOSE, protocol.UNKNOWN])
numbers = st.integers(0, 4).map(protocol.number_frame)
frames = st.lists(words | numbers | st.binary(max_size=9), max_size=4).flatmap(
    lambda drawn: st.sampled_from([drawn, said(*drawn)])
)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b"]), frames) | st.none(), max_size=60))
@settings(deadline=None)
def test_no_frames_upset_it_or_fill_its_memory(events: list[tuple[bytes, list[bytes]] | None]) -> None:
    roll = roll_with(2)
    for event in events:
        told = roll.beat() if event is None else roll.hear(*event)
        assert all(identity in {b"a", b"b"} for identity, *_ in told)
        per_life = [arrival for arrival in roll.arrived if isinstance(arrival, tuple)]
        assert all(sum(other is peer for other, _ in per_life) <= 2 for peer, _ in per_life)


def test_a_sender_is_lost_after_its_timeout_and_a_sign_of_life_starts_it_again() -> None:
    roll = roll_with(1)
    roll.hear(b"id", said(protocol.HELLO, b"learner"))
    for _ in range(3):
        roll.beat()
    roll.hear(b"id", said(protocol.BEAT, protocol.number_frame(0)))
    for _ in range(3):
        roll.beat()
    assert not roll.arrived
    roll.beat()
    assert [str(loss)[:7] for loss in roll.arrived if isinstance(loss, PeerVanished)] == ["learner"]
    answer = roll.hear(b"id", said(protocol.BEAT, protocol.number_frame(0)))
    assert answer == [(b"id", *said(protocol.UNKNOWN))]


def test_what_a_lost_sender_had_sent_comes_before_the_news_of_its_loss() -> None:
    roll = roll_with(2)
    roll.hear(b"id", said(protocol.HELLO, b"learner"))
    for payload in (b"1", b"2"):
        roll.hear(b"id", data(int(payload), payload))
    for _ in range(9):
        roll.beat()
    first, second, loss = roll.arrived
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert (first[1], second[1], type(loss)) == (b"1", b"2", PeerVanished)
    assert roll.taken(first[0]) == []
    assert not roll.is_over


def test_a_heartbeat_that_comes_late_and_twice_is_no_damage() -> None:
    roll = roll_with(2)
    roll.hear(b"id", said(protocol.HELLO, b"learner"))
    roll.hear(b"id", data(1, b"1"))
    assert roll.hear(b"id", said(protocol.BEAT, protocol.number_frame(0))) == []
    assert b"id" in roll.peers


def test_who_had_closed_is_told_so_once_more_at_the_end() -> None:
    roll = roll_with(1)
    roll.hear(b"id", said(protocol.HELLO, b"learner"))
    farewell = [(b"id", *said(protocol.GOODBYE))]
    assert roll.hear(b"id", said(protocol.CLOSE, protocol.number_frame(0))) == farewell
    assert roll.close() == farewell


def test_a_repeated_greeting_does_not_give_more_credit() -> None:
    roll = roll_with(2)
    first = roll.hear(b"id", said(protocol.HELLO, b"learner"))
    assert roll.hear(b"id", said(protocol.HELLO, b"learner")) == first
    for number in (1, 2, 3):
        roll.hear(b"id", data(number, b""))
    assert (len(roll.arrived), roll.refused) == (2, 1)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_a_seal_holds_every_bit(frames: list[bytes], drawn: st.DataObject) -> None:
    sealed = list(protocol.sealed(*frames))
    assert protocol.unsealed(sealed) == frames
    which = drawn.draw(st.sampled_from([number for number, frame in enumerate(sealed) if frame]))
    bit = drawn.draw(st.integers(0, 8 * len(sealed[which]) - 1))
    changed = bytearray(sealed[which])
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="not what was sent"):
        protocol.unsealed([*sealed[:which], bytes(changed), *sealed[which + 1 :]])
