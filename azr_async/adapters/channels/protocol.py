"""What the two ends of a ZeroMQ channel say to each other. One frame says which, the next ones are its arguments, the
last one is a digest of all of them.

sender -> receiver    HELLO name       let me join; repeated until the answer comes
                      DATA n message   my message number n, from 1 on; only with credit
                      BEAT n           I am alive, and have sent n messages
                      CLOSE n          those n were all; repeated until the answer comes
receiver -> sender    WELCOME n limit  joined; you may send n messages in all, of `limit` bytes each
                      ALLOW n          you may send n messages in all; repeated as heartbeat, so a lost one heals
                      GOODBYE          everything before your CLOSE has arrived
                      CLOSED           I shall receive nothing more
                      DAMAGED n        your message number n was lost or changed on the way: I gave up on you
                      UNKNOWN          you have not joined, or I gave up on you

Nothing that is changed, lost, repeated or out of order on the way gets through: what comes twice is dropped, what the
other end repeats anyway is waited for, and where a message is missing or changed both ends are told.
"""

import struct
from collections.abc import Sequence
from typing import Final

from xxhash import xxh3_64

HELLO: Final = b"HELLO"
DATA: Final = b"DATA"
BEAT: Final = b"BEAT"
CLOSE: Final = b"CLOSE"
WELCOME: Final = b"WELCOME"
ALLOW: Final = b"ALLOW"
GOODBYE: Final = b"GOODBYE"
CLOSED: Final = b"CLOSED"
DAMAGED: Final = b"DAMAGED"
UNKNOWN: Final = b"UNKNOWN"

LONGEST_NAME_BYTES: Final = 100

_NUMBER: Final = struct.Struct("<Q")


def sealed(*frames: bytes) -> tuple[bytes, ...]:
    """The frames, and their digest as one more."""
    return (*frames, _digest(frames))


def unsealed(frames: Sequence[bytes]) -> list[bytes]:
    """The frames that `sealed` was given. Raises ValueError when they are not as they were."""
    if len(frames) < 2 or _digest(frames[:-1]) != frames[-1]:
        raise ValueError("the frames are not what was sent")
    return list(frames[:-1])


def _digest(frames: Sequence[bytes]) -> bytes:
    state = xxh3_64()
    for frame in frames:
        state.update(_NUMBER.pack(len(frame)))
        state.update(frame)
    return state.digest()


def number_frame(number: int) -> bytes:
    """A count as a frame."""
    return _NUMBER.pack(number)


def read_number(frame: bytes) -> int:
    """Raises ValueError when the frame is not a count."""
    if len(frame) != _NUMBER.size:
        raise ValueError(f"a count has {_NUMBER.size} bytes, not {len(frame)}")
    return int(_NUMBER.unpack(frame)[0])


def is_name(name: str) -> bool:
    """Can this stand in a log line as the name of a process?"""
    return name.isprintable() and bool(name.strip()) and len(name.encode()) <= LONGEST_NAME_BYTES


def damage(channel: str, number: int, sender: str, receiver: str) -> str:
    """The text of both ends' error about a message that did not arrive as it was sent."""
    return (
        f"channel {channel}: message {number} from {sender} to {receiver} was lost or damaged on the way, so neither "
        "end trusts the connection any more. Where that repeats, look for bad memory or a full disk on this host."
    )


def silence(channel: str, peer: str, endpoint: str, seconds: float) -> str:
    """The text of every error about a peer that does not answer."""
    return (
        f"{peer} at {endpoint} (channel {channel}) has not answered for {seconds:.1f} s: it has died, or it hangs. "
        f"Look at logs/{peer}.log."
    )
