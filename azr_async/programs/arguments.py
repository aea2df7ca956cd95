"""What the command lines of several tools take."""

import argparse
from collections.abc import Callable
from typing import Final

MANY: Final = 1_000_000
"""More than anybody means."""


def whole_number(least: int, most: int = MANY) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return number

    return parse
