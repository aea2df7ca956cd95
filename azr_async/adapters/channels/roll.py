"""Who has joined a receiver, who may send how much, and what has arrived. Neither sockets nor clocks in here."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Final

from azr_async.adapters.channels import protocol
from azr_async.errors import PeerVanished

Frames = tuple[bytes, ...]
"""What to post: an identity, then what that peer is told."""

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

    @property
    def is_over(self) -> bool:
        """Has everybody who was expected been here and closed?"""
        return not self.peers and self._closed_senders >= self._terms.expected_senders

    def hear(self, identity: bytes, frames: list[bytes]) -> list[Frames]:
        """Take in what a peer said."""
        peer = self.peers.get(identity)
        if peer is None:
            return self._hear_stranger(identity, frames)
        peer.silent_beats = 0
        match frames:
            case [protocol.DATA, payload] if peer.arrived < peer.allowed:
                peer.arrived += 1
                self.arrived.append((peer, payload))
                return self._grant(peer)
            case [protocol.DATA, _]:
                self.refuse(peer.name, f"it sent more than the {self._terms.capacity} messages it may have under way")
            case [protocol.HELLO, _]:
                return [self._welcome(peer)]
            case [protocol.CLOSE]:
                del self.peers[identity]
                self._closed_senders += 1
                return [(identity, protocol.GOODBYE)]
            case [protocol.BEAT]:
                pass
            case _:
                self.refuse(peer.name, f"{len(frames)} frames that are not part of the protocol")
        return []

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
                self._lost(protocol.silence(terms.name, peer.name, self._endpoint, seconds))
        is_complete = len(self.peers) + self._closed_senders >= terms.expected_senders
        self._lonely_beats = 0 if is_complete else self._lonely_beats + 1
        seconds = self._lonely_beats * terms.heartbeat_seconds
        if terms.join_seconds is not None and seconds > terms.join_seconds:
            self._lonely_beats = 0
            joined = ", ".join(peer.name for peer in self.peers.values()) or "nobody"
            self._lost(
                f"channel {terms.name} at {self._endpoint} needs {terms.expected_senders} senders, but for "
                f"{seconds:.1f} s only {joined} was there ({self._closed_senders} have closed). "
                "Look at the logs of the others."
            )
        return [self._allow(peer) for peer in self.peers.values()]

    def close(self) -> list[Frames]:
        """Nothing more is wanted from anybody."""
        told: list[Frames] = [(identity, protocol.CLOSED) for identity in self.peers]
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
                self.peers[identity] = peer = Peer(identity, decoded)
                return [self._welcome(peer)]
            case [protocol.BEAT | protocol.CLOSE]:
                pass
            case _:
                self.refuse("a sender that has not joined", "it may only say HELLO and a printable name")
        return [(identity, protocol.UNKNOWN)]

    def _lost(self, text: str) -> None:
        self.arrived.append(PeerVanished(text))

    def _welcome(self, peer: Peer) -> Frames:
        peer.allowed = peer.taken + self._terms.capacity
        allowed, limit = protocol.number_frame(peer.allowed), protocol.number_frame(self._terms.limit_bytes)
        return (peer.identity, protocol.WELCOME, allowed, limit)

    def _grant(self, peer: Peer) -> list[Frames]:
        # A sender with half of its credit left needs no news yet; that saves most of the answers.
        capacity = self._terms.capacity
        is_needed = peer.allowed < peer.taken + capacity and peer.allowed - peer.arrived <= capacity // 2
        return [self._allow(peer)] if is_needed else []

    def _allow(self, peer: Peer) -> Frames:
        peer.allowed = peer.taken + self._terms.capacity
        return (peer.identity, protocol.ALLOW, protocol.number_frame(peer.allowed))
