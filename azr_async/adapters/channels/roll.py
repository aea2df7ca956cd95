"""Who has joined a receiver, who may send how much, and what has arrived. Neither sockets nor clocks in here."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Final

from azr_async.adapters.channels import protocol
from azr_async.errors import PeerVanished

Frames = tuple[bytes, ...]
"""What to post: an identity, then what that peer is told."""

REMEMBERED: Final = 64
"""Senders of which somebody else has the name now: what they still send is no fault."""

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a receiver was asked to be; `zmq_receiver` says what each means."""

    name: str
    capacity: int
    expected_senders: int
    join_seconds: float | None
    heartbeat_seconds: float
    peer_timeout_seconds: float
    limit_bytes: int


@dataclass(slots=True)
class Peer:
    """A sender that has joined and not yet closed."""

    identity: bytes
    name: str
    silent_beats: int = 0
    arrived: int = 0
    """Messages since it joined; so with `taken` and `allowed`."""
    taken: int = 0
    allowed: int = 0


class Roll:
    """The receiver's half of the protocol: frames in, frames to post out, messages and losses into `arrived`."""

    def __init__(self, terms: Terms, endpoint: str) -> None:
        self.peers: dict[bytes, Peer] = {}
        self.arrived: deque[tuple[Peer, bytes] | PeerVanished] = deque()
        self.refused = 0
        self._terms, self._endpoint = terms, endpoint
        self._closed_senders = self._lonely_beats = 0
        self._replaced: deque[bytes] = deque(maxlen=REMEMBERED)
        self._flushed: set[bytes] = set()  # who has closed: its GOODBYE may have been lost

    @property
    def is_over(self) -> bool:
        """Has everybody who was expected been here and closed?"""
        expected = self._terms.expected_senders
        return expected > 0 and not self.peers and self._closed_senders >= expected

    def hear(self, identity: bytes, frames: list[bytes]) -> list[Frames]:
        """Take in what a peer said."""
        peer = self.peers.get(identity)
        try:
            said = protocol.unsealed(frames)
        except ValueError:
            if peer is not None:
                return self._damaged(peer)
            self.refuse("a sender that has not joined", "frames that were damaged, or are not part of the protocol")
            return [_told(identity, protocol.UNKNOWN)]
        if peer is None:
            return self._hear_stranger(identity, said)
        peer.silent_beats = 0
        match said:
            case [protocol.DATA, number, payload]:
                return self._hear_message(peer, _count(number), payload)
            case [protocol.HELLO, _]:
                return [self._welcome(peer)]
            case [protocol.CLOSE | protocol.BEAT, number] if _count(number) > peer.arrived:
                return self._damaged(peer)
            case [protocol.CLOSE, _]:
                del self.peers[identity]
                self._closed_senders += 1
                self._flushed.add(identity)
                return [_told(identity, protocol.GOODBYE)]
            case [protocol.BEAT, _]:
                pass
            case _:
                self.refuse(peer.name, f"{len(said)} frames that are not part of the protocol")
        return []

    def _hear_message(self, peer: Peer, number: int, payload: bytes) -> list[Frames]:
        if number <= peer.arrived:
            self.refuse(peer.name, f"message {number} came twice")
            return []
        if number > peer.arrived + 1:
            return self._damaged(peer)
        if peer.arrived >= peer.allowed:
            self.refuse(peer.name, f"it sent more than the {self._terms.capacity} messages it may have under way")
            return []
        peer.arrived += 1
        self.arrived.append((peer, payload))
        return self._grant(peer)

    def _damaged(self, peer: Peer) -> list[Frames]:
        """A message of this sender is missing, or was changed: nothing after it can be trusted."""
        number = peer.arrived + 1
        del self.peers[peer.identity]
        self._lost(protocol.damage(self._terms.name, number, peer.name, "here"))
        return [_told(peer.identity, protocol.DAMAGED, protocol.number_frame(number))]

    def taken(self, peer: Peer) -> list[Frames]:
        """The consumer took one of the peer's messages: that is room for another one."""
        peer.taken += 1
        return self._grant(peer) if peer.identity in self.peers else []

    def beat(self) -> list[Frames]:
        """One heartbeat has passed: strike off who has been silent for too long, tell the others what they may send.

        Silence is counted in beats, not read off a clock: while this process itself is held up, nothing is counted.
        """
        terms = self._terms
        for peer in list(self.peers.values()):
            peer.silent_beats += 1
            seconds = peer.silent_beats * terms.heartbeat_seconds
            if seconds > terms.peer_timeout_seconds:
                del self.peers[peer.identity]
                self._lost(protocol.silence(terms.name, peer.name, self._endpoint, seconds), peer.name)
        closed = self._closed_senders if terms.expected_senders else 0
        is_complete = len(self.peers) + closed >= max(1, terms.expected_senders)
        self._lonely_beats = 0 if is_complete else self._lonely_beats + 1
        seconds = self._lonely_beats * terms.heartbeat_seconds
        if terms.join_seconds is not None and seconds > terms.join_seconds:
            self._lonely_beats = 0
            joined = ", ".join(peer.name for peer in self.peers.values()) or "nobody"
            self._lost(
                f"channel {terms.name} at {self._endpoint} needs {max(1, terms.expected_senders)} senders, but for "
                f"{seconds:.1f} s only {joined} was there ({self._closed_senders} have closed). "
                "Look at the logs of the others."
            )
        return [self._allow(peer) for peer in self.peers.values()]

    def close(self) -> list[Frames]:
        """Nothing more is wanted from anybody."""
        told: list[Frames] = [_told(identity, protocol.CLOSED) for identity in self.peers]
        told += [_told(identity, protocol.GOODBYE) for identity in self._flushed]  # the first may have been lost
        self.peers.clear()
        self.arrived.clear()
        return told

    def refuse(self, sender: str, reason: str) -> None:
        """Count a message that was dropped."""
        self.refused += 1
        if self.refused.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...: a flood must not fill the log
            name = self._terms.name
            _LOG.warning("channel %s has refused %d messages, the last from %s: %s", name, self.refused, sender, reason)

    def _hear_stranger(self, identity: bytes, frames: list[bytes]) -> list[Frames]:
        match frames:
            case [protocol.HELLO, name] if protocol.is_name(decoded := name.decode(errors="replace")):
                self._make_way_for(decoded)
                self.peers[identity] = peer = Peer(identity, decoded)
                return [self._welcome(peer)]
            case [protocol.BEAT | protocol.CLOSE, _] if identity in self._flushed:
                return [_told(identity, protocol.GOODBYE)]  # the first one was lost
            case [protocol.BEAT | protocol.CLOSE, _]:
                pass
            case _ if identity in self._replaced:  # it is late, that is all
                pass
            case _:
                self.refuse("a sender that has not joined", "it may only say HELLO and a printable name")
        return [_told(identity, protocol.UNKNOWN)]

    def _make_way_for(self, name: str) -> None:
        """A program has a name once: one that was here under it has been started again, or connects again."""
        for peer in [peer for peer in self.peers.values() if peer.name == name]:
            del self.peers[peer.identity]
            self._replaced.append(peer.identity)

    def _lost(self, text: str, silent: str = "") -> None:
        self.arrived.append(PeerVanished(text, silent))

    def _welcome(self, peer: Peer) -> Frames:
        peer.allowed = peer.taken + self._terms.capacity
        allowed, limit = protocol.number_frame(peer.allowed), protocol.number_frame(self._terms.limit_bytes)
        return _told(peer.identity, protocol.WELCOME, allowed, limit)

    def _grant(self, peer: Peer) -> list[Frames]:
        # A sender with half of its credit left needs no news yet; that saves most of the answers.
        capacity = self._terms.capacity
        is_needed = peer.allowed < peer.taken + capacity and peer.allowed - peer.arrived <= capacity // 2
        return [self._allow(peer)] if is_needed else []

    def _allow(self, peer: Peer) -> Frames:
        peer.allowed = peer.taken + self._terms.capacity
        return _told(peer.identity, protocol.ALLOW, protocol.number_frame(peer.allowed))


def _told(identity: bytes, *frames: bytes) -> Frames:
    return (identity, *protocol.sealed(*frames))


def _count(frame: bytes) -> int:
    """The count in a frame; one that nobody can have sent when it is none."""
    try:
        return protocol.read_number(frame)
    except ValueError:
        return -1
