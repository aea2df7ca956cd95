"""The seccomp filters, run by a small interpreter of the kernel's filter language, for both architectures."""

import errno
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.adapters.sandbox.filters.__main__ import TARGET, generated
from azr_async.adapters.sandbox.filters.assembler import ARCHITECTURES
from azr_async.adapters.sandbox.filters.numbers import SYSTEM_CALLS
from azr_async.adapters.sandbox.filters.rules import ALLOW, FILTERS, KILL, Guarded, refuse
from azr_async.adapters.sandbox.inside.filters import FILTERS as SHIPPED

BOTH = pytest.mark.parametrize("machine", list(ARCHITECTURES))
KERNEL_LIMIT_INSTRUCTIONS = 4096
OTHER_SYSTEM_CALLS = {
    "socket": (41, 198),
    "connect": (42, 203),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "memfd_create": (319, 279),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "kill": (62, 129),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "wait4": (61, 260),
    "setrlimit": (160, 164),
    "pidfd_open": (434, 434),
    "open_by_handle_at": (304, 265),
    "clone": (56, 220),
}


def answer(program: bytes, number: int, arguments: tuple[int, ...] = (), *, architecture: int) -> int:
    """What the filter returns for one system call."""
    padded = (*arguments, *([0] * (6 - len(arguments))))
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(argument % 2**64 for argument in padded))
    accumulator = place = 0
    for _ in range(KERNEL_LIMIT_INSTRUCTIONS):
        code, if_true, if_false, value = struct.unpack_from("<HBBI", program, place * 8)
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            place += value
        elif code in (0x15, 0x35):
            holds = accumulator == value if code == 0x15 else accumulator >= value
            place += if_true if holds else if_false
        else:
            assert code == 0x06
            return value
    raise AssertionError("the filter does not end")


def ask(machine: str, name: str, number: int | None, *arguments: int) -> int | None:
    """The answer of filter `name`; None for a system call that this machine does not have."""
    if number is None:
        return None
    return answer(SHIPPED[machine][name], number, arguments, architecture=ARCHITECTURES[machine])


def number_of(call: str, machine: str) -> int | None:
    return {**SYSTEM_CALLS, **OTHER_SYSTEM_CALLS}[call][list(ARCHITECTURES).index(machine)]


def child(machine: str, call: str, *arguments: int) -> int | None:
    return ask(machine, "CHILD", number_of(call, machine), *arguments)


def test_the_shipped_filters_are_those_of_the_rules() -> None:
    assert Path(TARGET).read_text(encoding="ascii") == generated()


@BOTH
@pytest.mark.parametrize("name", list(FILTERS))
def test_every_named_call_gets_what_the_rules_say(machine: str, name: str) -> None:
    for call, wanted in FILTERS[name].calls.items():
        if not isinstance(wanted, Guarded):
            assert ask(machine, name, number_of(call, machine)) in (wanted, None), call


@BOTH
@pytest.mark.parametrize("name", list(FILTERS))
def test_every_other_number_gets_the_default(machine: str, name: str) -> None:
    named = {number_of(call, machine) for call in FILTERS[name].calls}
    for number in set(range(600)) - named:
        assert ask(machine, name, number) == FILTERS[name].otherwise, number


@BOTH
@pytest.mark.parametrize("call", OTHER_SYSTEM_CALLS)
def test_a_child_that_asks_for_more_than_computing_is_killed(machine: str, call: str) -> None:
    assert child(machine, call) == KILL


@BOTH
@given(fd=st.integers(0, 2**64 - 1))
def test_a_child_writes_to_its_result_and_reads_its_request_only(machine: str, fd: int) -> None:
    # The kernel takes the lower half of the argument for the descriptor.
    bad = refuse(errno.EBADF)
    assert child(machine, "write", fd) == (ALLOW if fd % 2**32 == 3 else bad)
    assert child(machine, "read", fd) == (ALLOW if fd % 2**32 == 4 else bad)
    assert child(machine, "write", 3) == ALLOW
    assert child(machine, "read", 4) == ALLOW


@BOTH
@given(protection=st.integers(0, 2**32 - 1), flags=st.integers(0, 2**32 - 1))
def test_memory_is_private_anonymous_and_never_executable(machine: str, protection: int, flags: int) -> None:
    is_plain = not protection & 4 and flags & 0x21 == 0x20 and not flags & 0x42000
    assert child(machine, "mmap", 0, 4096, protection, flags) == (ALLOW if is_plain else KILL)
    assert child(machine, "mprotect", 0, 4096, protection) == (KILL if protection & 4 else ALLOW)


@BOTH
def test_ordinary_memory_is_allowed(machine: str) -> None:
    assert child(machine, "mmap", 0, 4096, 3, 0x22) == ALLOW
    assert child(machine, "mprotect", 0, 4096, 3) == ALLOW
    assert child(machine, "madvise", 0, 4096, 4) == ALLOW
    assert child(machine, "madvise", 0, 4096, 100) == refuse(errno.EINVAL)


@BOTH
@pytest.mark.parametrize("name", list(FILTERS))
@given(number=st.integers(0, 2**32 - 1), architecture=st.integers(0, 2**32 - 1))
def test_a_call_of_another_architecture_is_killed(machine: str, name: str, number: int, architecture: int) -> None:
    foreign = architecture if architecture != ARCHITECTURES[machine] else 0x40000003
    assert answer(SHIPPED[machine][name], number, architecture=foreign) == KILL


@pytest.mark.parametrize("name", list(FILTERS))
@given(number=st.integers(0x40000000, 2**32 - 1))
def test_the_second_call_table_of_x86_64_is_closed(name: str, number: int) -> None:
    assert ask("x86_64", name, number) == KILL


@BOTH
def test_a_zygote_forks_but_leaves_no_namespace(machine: str) -> None:
    clone = number_of("clone", machine)
    assert ask(machine, "ZYGOTE", clone, 0x01200011) == ALLOW
    assert ask(machine, "ZYGOTE", clone, 0x10000011) == refuse(errno.EPERM)
    assert ask(machine, "ZYGOTE", number_of("clone3", machine)) == refuse(errno.ENOSYS)
    assert ask(machine, "ZYGOTE", number_of("socket", machine)) == refuse(errno.EPERM)


@BOTH
def test_what_a_child_may_do_its_zygote_may_too(machine: str) -> None:
    # A child has both filters, so anything else would be lost to it.
    for call, wanted in FILTERS["CHILD"].calls.items():
        if wanted == ALLOW:
            assert ask(machine, "ZYGOTE", number_of(call, machine)) in (ALLOW, None), call
