"""The system calls that Python has no name for. Every function raises OSError when the kernel says no."""

import ctypes
import os
from collections.abc import Callable
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39

NAMESPACES: Final = {
    "mnt": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
"""Kinds of namespace by their names in /proc/self/ns, with their CLONE_NEW* flags."""

_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}
_CAPGET: Final = {"x86_64": 125, "aarch64": 90}
_CAPSET: Final = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 32, 0x4000, 0x40000
_MNT_DETACH: Final = 2
_CAPABILITIES: Final = 64

_libc: Final = ctypes.CDLL(None, use_errno=True)
_machine: Final = os.uname().machine


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with one argument."""
    return _checked("prctl", _libc.prctl(option, value, 0, 0, 0))


def seccomp_filter(instructions: bytes) -> Callable[[], None]:
    """A function that puts a filter on this thread and all that it starts, for good. Needs no_new_privs."""
    program = _Program(len(instructions) // 8, instructions)
    return _prepared("seccomp", _libc.syscall, _SECCOMP[_machine], 1, 0, ctypes.addressof(program), keep=program)


def prepared_prctl(option: int, value: int = 0) -> Callable[[], None]:
    """A function that makes this call of `prctl`."""
    return _prepared("prctl", _libc.prctl, option, value, 0, 0, 0)


def _prepared(name: str, function: Callable[..., int], *numbers: int, keep: object = None) -> Callable[[], None]:
    """All is made ready beforehand, because every object that a forked child touches costs it a page fault."""
    arguments = tuple(ctypes.c_long(number) for number in numbers)

    def call(_memory: object = keep) -> None:
        if function(*arguments) == -1:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")

    return call


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones."""
    _checked("unshare", _libc.unshare(flags))


def empty_root() -> None:
    """Make an empty, read-only directory the root of this mount namespace, with nothing else left in it."""
    _mount(None, b"/", None, _MS_REC | _MS_PRIVATE)
    place = next(path for path in ("/tmp", "/proc", "/dev") if os.path.isdir(path))
    _mount(b"none", place.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(place)
    _call("pivot_root", _PIVOT_ROOT[_machine], b".", b".")
    _checked("umount", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    _mount(None, b"/", None, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)


def drop_bounding_capabilities() -> None:
    """No program that this process might execute could have a capability."""
    for capability in range(_CAPABILITIES):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return  # past the last one that this kernel knows, or not privileged to drop


def drop_capabilities() -> None:
    """Have none."""
    _call("capset", _CAPSET[_machine], ctypes.byref(_CapabilityHeader(0x20080522, 0)), (ctypes.c_uint32 * 6)())


def capabilities() -> int:
    """The effective ones, as bits."""
    data = (ctypes.c_uint32 * 6)()
    _call("capget", _CAPGET[_machine], ctypes.byref(_CapabilityHeader(0x20080522, 0)), data)
    return data[0] | data[3] << 32


def landlock_deny_all() -> int:
    """No file and no TCP port can be opened from now on, and no signal sent out; the kernel's Landlock version."""
    version = _call("landlock", _LANDLOCK_CREATE_RULESET, None, 0, 1)
    file_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    ruleset = _Ruleset((1 << file_rights) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    fd = _call("landlock", _LANDLOCK_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    try:
        _call("landlock", _LANDLOCK_RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)
    return version


def system_call(number: int, *arguments: int) -> int:
    """Any system call at all; for the canaries, which try what must not work."""
    return _call(f"system call {number}", number, *(ctypes.c_long(argument) for argument in arguments))


def _mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int) -> None:
    _checked("mount", _libc.mount(source, target, kind, ctypes.c_ulong(flags), None))


def _call(name: str, number: int, *arguments: object) -> int:
    return _checked(name, _libc.syscall(ctypes.c_long(number), *arguments))


def _checked(name: str, result: int) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result
