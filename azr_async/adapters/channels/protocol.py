"""What the two ends of a ZeroMQ channel say to each other. One frame says which, the next ones are its arguments.

sender -> receiver    HELLO name       let me join; repeated until the answer comes
                      DATA message     only with credit
                      BEAT             I am alive
                      CLOSE            that was all
receiver -> sender    WELCOME n limit  joined; you may send n messages in all, of `limit` bytes each
                      ALLOW n          you may send n messages in all; repeated as heartbeat, so a lost one heals
                      GOODBYE          everything before your CLOSE has arrived
                      CLOSED           I shall receive nothing more
                      UNKNOWN          you have not joined, or I gave up on you
"""

import struct
from typing import Final

HELLO: Final = b"HELLO"
DATA: Final = b"DATA"
BEAT: Final = b"BEAT"
CLOSE: Final = b"CLOSE"
WELCOME: Final = b"WELCOME"
ALLOW: Final = b"ALLOW"
GOODBYE: Final = b"GOODBYE"
CLOSED: Final = b"CLOSED"
UNKNOWN: Final = b"UNKNOWN"

LONGEST_NAME_BYTES: Final = 100

_NUMBER: Final = struct.Struct("<Q")


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


def silence(channel: str, peer: str, endpoint: str, seconds: float) -> str:
    """The text of every error about a peer that does not answer."""
    return (
        f"{peer} at {endpoint} (channel {channel}) has not answered for {seconds:.1f} s: it has died, or it hangs. "
        f"Look at logs/{peer}.log."
    )
