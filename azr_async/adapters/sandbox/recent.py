"""A bounded memory of what was found out before."""

from collections import OrderedDict
from hashlib import blake2b
from typing import Final, Generic, TypeVar

Value = TypeVar("Value")

ENTRY_BYTES: Final = 400
"""What an entry takes beside its content: key, list links, the objects that hold the content."""


class Recent(Generic[Value]):
    """The entries that were used last, as many as fit into `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()

    def get(self, key: bytes) -> Value | None:
        """The entry, if it is still remembered."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, value: Value, content_bytes: int) -> None:
        """Remember the entry, whose content takes `content_bytes`, and forget the oldest."""
        if key in self._entries:
            self._forget(key)
        self._entries[key] = value, content_bytes + ENTRY_BYTES
        self._bytes += content_bytes + ENTRY_BYTES
        while self._bytes > self._most_bytes:
            self._forget(next(iter(self._entries)))

    def _forget(self, key: bytes) -> None:
        self._bytes -= self._entries.pop(key)[1]


def digest(text: str) -> bytes:
    """A key that stands for any text, however long and whatever is in it."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
