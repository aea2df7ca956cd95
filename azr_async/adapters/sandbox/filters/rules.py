"""Which system calls a sandboxed process may make, by name.

`CHILD` is the wall around an untrusted program: it may compute, use memory that it cannot execute, read its request and
write its result. What harmless programs try in passing gets an error and they go on; anything else ends the process.
`ZYGOTE` is what the zygote needs beyond that: to fork, to kill, to wait. A child has both filters, and each system call
gets the stricter answer of the two.
"""

import errno
from dataclasses import dataclass, field
from typing import Final

RESULT_FD: Final = 3
REQUEST_FD: Final = 4

ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000
"""SIGSYS to the whole process; cannot be caught."""


def refuse(error: int) -> int:
    """The system call does nothing and fails with `error`."""
    return 0x00050000 | error


@dataclass(frozen=True, slots=True)
class Test:
    """True if `argument & mask == value`, on the lower 32 bits: all that the kernel looks at in these arguments."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Guarded:
    """`inside` if one of the alternatives holds, each a list of tests that must all hold; else `outside`."""

    alternatives: tuple[tuple[Test, ...], ...]
    outside: int
    inside: int = ALLOW


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What each named system call gets; unnamed ones get `otherwise`."""

    otherwise: int
    calls: dict[str, int | Guarded] = field(default_factory=dict)


_COMPUTE: Final = """
    exit exit_group munmap mremap brk futex rt_sigreturn rt_sigprocmask sigaltstack clock_gettime
    clock_nanosleep nanosleep gettimeofday time close sched_yield getpid gettid getrandom rseq set_robust_list
    restart_syscall
"""
_TRIED_IN_PASSING: Final = """
    openat open stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd getdents64
    ioctl lseek fstat fcntl uname sysinfo getuid geteuid getgid getegid getppid sched_getaffinity prlimit64
    getrlimit getrusage times rt_sigaction dup dup2 dup3 pipe2 poll select pselect6 ppoll epoll_create1 tgkill
"""
_ZYGOTE: Final = """
    read write getppid clone fork vfork wait4 waitid kill rt_sigtimedwait prctl seccomp prlimit64 setrlimit setpriority
    set_tid_address
"""

_PROT_EXEC: Final = 0x4
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_LOCKED, _MAP_HUGETLB = 0x01, 0x20, 0x2000, 0x40000
_MADV_DONTNEED, _MADV_FREE = 4, 8
_CLONE_NEW_NAMESPACES: Final = 0x7E020080

_NOT_EXECUTABLE: Final = Test(2, 0, _PROT_EXEC)
_OWN_MEMORY: Final = Test(3, _MAP_ANONYMOUS, _MAP_SHARED | _MAP_ANONYMOUS | _MAP_LOCKED | _MAP_HUGETLB)

_MEMORY: Final[dict[str, int | Guarded]] = {
    "mmap": Guarded(((_NOT_EXECUTABLE, _OWN_MEMORY),), refuse(errno.EPERM)),
    "mprotect": Guarded(((_NOT_EXECUTABLE,),), refuse(errno.EPERM)),
    "madvise": Guarded(((Test(2, _MADV_DONTNEED),), (Test(2, _MADV_FREE),)), refuse(errno.EINVAL)),
    # The C library then falls back to clone; with EPERM it would give up.
    "clone3": refuse(errno.ENOSYS),
}

CHILD: Final = Rules(
    otherwise=KILL,
    calls={
        **dict.fromkeys(_TRIED_IN_PASSING.split(), refuse(errno.EPERM)),
        **dict.fromkeys(_COMPUTE.split(), ALLOW),
        **_MEMORY,
        "mmap": Guarded(((_NOT_EXECUTABLE, _OWN_MEMORY),), KILL),
        "mprotect": Guarded(((_NOT_EXECUTABLE,),), KILL),
        "write": Guarded(((Test(0, RESULT_FD),),), refuse(errno.EBADF)),
        "read": Guarded(((Test(0, REQUEST_FD),),), refuse(errno.EBADF)),
    },
)

ZYGOTE: Final = Rules(
    otherwise=refuse(errno.EPERM),
    calls={
        **dict.fromkeys(f"{_COMPUTE} {_ZYGOTE}".split(), ALLOW),
        **_MEMORY,
        "clone": Guarded(((Test(0, 0, _CLONE_NEW_NAMESPACES),),), refuse(errno.EPERM)),
    },
)

FILTERS: Final = {"CHILD": CHILD, "ZYGOTE": ZYGOTE}
