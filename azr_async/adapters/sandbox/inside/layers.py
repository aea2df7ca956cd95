"""What a sandboxed process does to itself before it meets anything untrusted.

Each layer is put on, then its effect is looked at; what a host does not offer is reported, not hidden. The order
matters: files in /proc are written before they belong to root, namespaces are left while there are still privileges,
the filter comes last because it forbids all the rest.
"""

import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from typing import Final, TypedDict

from azr_async.adapters.sandbox.inside import kernel
from azr_async.adapters.sandbox.inside.filters import FILTERS

RESULT_FD: Final = 3
REQUEST_FD: Final = 4
CONTROL_FD: Final = 5
REPORT_FD: Final = 6

real_fork: Final = os.fork
"""`starters.py` puts another one in its place, for programs."""
NOBODY: Final = 65_534
OPEN_FILES: Final = 32
_FILTERS: Final = FILTERS.get(os.uname().machine, {})

Report = dict[str, str]
"""Layer -> `verified` with details, or `unavailable: ` and why."""


class Options(TypedDict):
    """What the pool tells a process that it starts; JSON in its command line."""

    allowed_imports: list[str]
    memory_mb: int
    cpu_seconds: int
    result_bytes: int
    is_gated: bool
    flavour: int
    """0, 1, ..: processes of different flavours differ in everything that a deterministic program must not see."""
    fds: list[int]
    """The inherited descriptors that become 3, 4, ..."""
    parent: int
    """Process id of the pool's process."""


class Ineffective(OSError):
    """A layer was put on without an error, and does not do what it is for."""


class CannotFork(OSError):
    """There is no room for another process: that says nothing about any layer."""


def die_with(parent: int | None) -> None:
    """Be killed when the thread that started this process ends; `parent` None if it cannot be seen from here."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def confine(options: Options, *, filter_name: str) -> Report:
    """Put on every layer that this host offers, in a new process if that takes one; returns in the confined one."""
    report: Report = {}
    memory_bytes = address_space_and_resident_bytes()[0] + (options["memory_mb"] << 20)
    _try(report, "oom_score", _be_killed_first)
    _try(report, "namespaces", _leave_namespaces)
    if report["namespaces"].startswith("verified"):
        _go_on_in_a_new_process(options["parent"])
        _try(report, "file_view", _empty_file_view)
    else:
        report["file_view"] = "unavailable: needs a mount namespace"
    _try(report, "user", _become_nobody)
    _try(report, "capabilities", _drop_capabilities)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # the change of user has taken it off
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    _try(report, "no_new_privs", _no_new_privileges)
    _try(report, "rlimits", lambda: _set_limits(memory_bytes))
    _try(report, "landlock", _deny_files)
    _try(report, "environment", _empty_environment)
    _try(report, "seccomp", lambda: _filter_system_calls(filter_name))
    return report


def child_wall(report: Report, cpu_seconds: int) -> Callable[[], None]:
    """The last layers: no more processes, so much CPU time, the filter. Call it in every child before anything else.

    Made ready in the zygote, and with nothing to look up: what a child touches first costs it a page fault.
    """
    set_limit, close, parent_of_this = resource.setrlimit, os.close, os.getppid
    cpu, processes = resource.RLIMIT_CPU, resource.RLIMIT_NPROC
    some_seconds, none = (cpu_seconds, cpu_seconds + 1), (0, 0)
    zygote = os.getpid()
    # The end of a PID namespace's first process ends all others in it.
    must_die_with_zygote = zygote != 1
    die_with_parent = kernel.prepared_prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    put_filter_on = kernel.seccomp_filter(_FILTERS["CHILD"]) if report["seccomp"].startswith("verified") else None

    def put_on() -> None:
        if must_die_with_zygote:
            die_with_parent()
            if parent_of_this() != zygote:
                os._exit(1)
        set_limit(cpu, some_seconds)
        set_limit(processes, none)
        if put_filter_on is not None:
            put_filter_on()
        else:
            close(CONTROL_FD)  # which the filter would forbid to use
            close(REPORT_FD)

    return put_on


def _try(report: Report, name: str, layer: Callable[[], str]) -> None:
    try:
        report[name] = f"verified {layer()}".strip()
    except CannotFork:
        raise
    except (OSError, ValueError, KeyError) as error:
        report[name] = f"unavailable: {error.strerror if isinstance(error, OSError) and error.strerror else error}"


def _be_killed_first() -> str:
    _write_file("/proc/self/oom_score_adj", "1000")
    return "1000"


def _leave_namespaces() -> str:
    """New namespaces, preferably as nobody and with a user namespace; as root without one where that is refused."""
    kinds = dict(kernel.NAMESPACES)
    if os.geteuid() == 0:
        if _works_in_a_fork(partial(_unshare_as_nobody, kinds)):
            _setuid_nobody()
        else:
            del kinds["user"]
    if not _works_in_a_fork(partial(_unshare, kinds)):
        kernel.unshare(kernel.NAMESPACES["user"])  # says why not
        raise Ineffective("cannot be used together")
    _unshare(kinds)
    return " ".join(sorted(kinds))


def _unshare_as_nobody(kinds: dict[str, int]) -> None:
    _setuid_nobody()
    _unshare(kinds)


def _unshare(kinds: dict[str, int]) -> None:
    user, group = os.geteuid(), os.getegid()
    before = _namespace_ids(kinds)
    kernel.unshare(sum(kinds.values()))
    if "user" in kinds:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            _write_file(f"/proc/self/{name}", text)
    after = _namespace_ids(kinds)
    if same := [kind for kind in before if before[kind] == after[kind]]:
        raise Ineffective(f"still in the old {', '.join(same)}")


def _namespace_ids(kinds: dict[str, int]) -> dict[str, str]:
    """Of all but the one for process ids, which only later processes will be in."""
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in kinds if kind != "pid"}


def _write_file(path: str, text: str) -> None:
    """Without `open`, which may have to import a codec that nobody may read."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _fork() -> int:
    try:
        return real_fork()
    except OSError as error:
        raise CannotFork(error.errno, error.strerror) from None


def _works_in_a_fork(attempt: Callable[[], None]) -> bool:
    child = _fork()
    if child == 0:
        status = 1
        try:
            attempt()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def _go_on_in_a_new_process(owner: int) -> None:
    """The PID namespace holds only processes started from now on: this one stays behind and waits for its child."""
    child = _fork()
    if child != 0:
        die_with(owner)  # the change of user has taken it off
        os.closerange(3, 256)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    die_with(None)
    if os.getpid() != 1:
        raise Ineffective("not the first process of a PID namespace")


def _empty_file_view() -> str:
    kernel.empty_root()
    if os.listdir("/"):
        raise Ineffective("the root directory is not empty")
    return "empty and read-only"


def _become_nobody() -> str:
    if os.geteuid() == 0:
        _setuid_nobody()
    return f"{os.geteuid()}"


def _setuid_nobody() -> None:
    kernel.drop_bounding_capabilities()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # the change of user has cleared it, and /proc/self is still needed


def _drop_capabilities() -> str:
    kernel.drop_bounding_capabilities()
    kernel.drop_capabilities()
    if kernel.capabilities() != 0:
        raise Ineffective("some are left")
    return "none"


def _no_new_privileges() -> str:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) != 1:
        raise Ineffective("not set")
    return ""


def address_space_and_resident_bytes() -> tuple[int, int]:
    """What this process has now. `getrusage` tells the peak of whoever started it, which survives `exec`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        address_space, resident, *_ = file.read().split()
    return int(address_space) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _set_limits(memory_bytes: int) -> str:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_DATA: memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    try:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    except (OSError, ValueError):
        return "without message queues"  # gVisor has none to limit
    return ""


def _deny_files() -> str:
    version = kernel.landlock_deny_all()
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    except PermissionError:
        return f"version {version}"
    raise Ineffective("the root directory can still be opened")


def _empty_environment() -> str:
    if unexpected := set(os.environ) - {"PYTHONHASHSEED", "LANG", "LC_CTYPE"}:
        raise Ineffective(f"holds {', '.join(sorted(unexpected))}")
    os.environ.clear()  # Python has read these at its start; no program is to know its hash seed
    return "empty"


def _filter_system_calls(name: str) -> str:
    kernel.seccomp_filter(_FILTERS[name])()
    try:
        os.getcwd()
    except PermissionError:
        return ""
    raise Ineffective("a forbidden system call succeeded")
