"""Rules -> classic BPF, the kernel's filter instructions (linux/filter.h, linux/seccomp.h).

A filter checks the architecture, finds the system call's number by binary search over ranges with one answer each, and
returns the answer; guarded calls look at their arguments first.
"""

import struct
from dataclasses import dataclass
from typing import Final

from azr_async.adapters.sandbox.filters.numbers import SYSTEM_CALLS
from azr_async.adapters.sandbox.filters.rules import KILL, Guarded, Rules

ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_*: the kernel tells a filter which table a number belongs to."""

_LOAD_WORD, _AND, _RETURN = 0x20, 0x54, 0x06
_JUMP, _JUMP_EQUAL, _JUMP_GREATER_EQUAL = 0x05, 0x15, 0x35
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
_X32_BIT: Final = 0x40000000

Answer = int | Guarded
Range = tuple[int, Answer]
"""Start of a range of numbers, and what every number in it gets."""


@dataclass(frozen=True, slots=True)
class _Instruction:
    code: int
    value: int
    if_true: int = 0
    if_false: int = 0

    def packed(self) -> bytes:
        if not (0 <= self.if_true < 256 and 0 <= self.if_false < 256):
            raise ValueError("a jump is too long for the filter")
        return struct.pack("<HBBI", self.code, self.if_true, self.if_false, self.value)


def assemble(rules: Rules, architecture: str) -> bytes:
    """The filter for one architecture, as `struct sock_filter` array."""
    head = [
        _Instruction(_LOAD_WORD, _ARCHITECTURE_OFFSET),
        _Instruction(_JUMP_EQUAL, ARCHITECTURES[architecture], if_true=1),
        _Instruction(_RETURN, KILL),
        _Instruction(_LOAD_WORD, _NUMBER_OFFSET),
    ]
    return b"".join(instruction.packed() for instruction in head + _search(_ranges(rules, architecture)))


def _ranges(rules: Rules, architecture: str) -> list[Range]:
    """The whole number line, cut where the answer changes."""
    column = list(ARCHITECTURES).index(architecture)
    answers = {SYSTEM_CALLS[name][column]: answer for name, answer in rules.calls.items()}
    ranges: list[Range] = []
    end = 0
    for number, answer in sorted((number, answer) for number, answer in answers.items() if number is not None):
        ranges += [(end, rules.otherwise)] * (number > end) + [(number, answer)]
        end = number + 1
    # The x32 table of x86_64 reuses small numbers with this bit set; no range may reach into it.
    ranges += [(end, rules.otherwise), (_X32_BIT, KILL)]
    return [ranges[0]] + [ranges[i] for i in range(1, len(ranges)) if ranges[i][1] != ranges[i - 1][1]]


def _search(ranges: list[Range]) -> list[_Instruction]:
    if len(ranges) == 1:
        return _answer(ranges[0][1])
    middle = len(ranges) // 2
    lower, upper = _search(ranges[:middle]), _search(ranges[middle:])
    if len(lower) < 256:
        return [_Instruction(_JUMP_GREATER_EQUAL, ranges[middle][0], if_true=len(lower)), *lower, *upper]
    far = [_Instruction(_JUMP_GREATER_EQUAL, ranges[middle][0], if_false=1), _Instruction(_JUMP, len(lower))]
    return [*far, *lower, *upper]


def _answer(answer: Answer) -> list[_Instruction]:
    if isinstance(answer, int):
        return [_Instruction(_RETURN, answer)]
    code: list[_Instruction] = []
    for alternative in answer.alternatives:
        tests: list[_Instruction] = []
        for test in reversed(alternative):
            # Each test that fails jumps over the rest of its alternative, the return included.
            tests = [
                _Instruction(_LOAD_WORD, _ARGUMENTS_OFFSET + 8 * test.argument),
                _Instruction(_AND, test.mask),
                _Instruction(_JUMP_EQUAL, test.value, if_false=len(tests) + 1),
                *tests,
            ]
        code += [*tests, _Instruction(_RETURN, answer.inside)]
    return [*code, _Instruction(_RETURN, answer.outside)]
