"""What an escaped program would do, tried on every start: each attempt must fail, or the sandbox does not hold.

A canary runs where a program would run, in a child of the zygote behind every layer, but with all of Python at hand. It
answers `V"escaped"` if it got through; an error or the end of its process is what should happen.
"""

import _thread
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Final

from azr_async.adapters.sandbox.inside import kernel
from azr_async.adapters.sandbox.inside.wire import REPORT

CANARY: Final = b"P"
"""First letter of a request that names a canary in place of a program."""

_X86_64: Final = os.uname().machine == "x86_64"
_PTRACE_ATTACH: Final = 16
_AF_INET, _SOCK_STREAM = 2, 1
_RESULT, _CONTROL, _REPORT = 3, 5, 6


def attempts(request: bytes) -> Iterator[bytes]:
    """The answer of the canary that `request` names."""
    try:
        CANARIES[request[1:].decode()]()
    except (OSError, MemoryError, RuntimeError) as error:
        yield b"E" + type(error).__name__.encode()
    else:
        yield b'V"escaped"'


def _read_file() -> None:
    os.read(os.open("/etc/passwd", os.O_RDONLY), 1)


def _write_file() -> None:
    os.close(os.open("/tmp/escaped", os.O_WRONLY | os.O_CREAT))
    os.unlink("/tmp/escaped")


def _list_root() -> None:
    if not os.listdir("/"):
        raise FileNotFoundError


def _make_directory() -> None:
    os.mkdir("/tmp/escaped")
    os.rmdir("/tmp/escaped")


def _open_a_socket() -> None:
    kernel.system_call(41 if _X86_64 else 198, _AF_INET, _SOCK_STREAM, 0)


def _signal_the_zygote() -> None:
    os.kill(os.getppid(), 0)


def _signal_everybody() -> None:
    os.kill(-1, 0)


def _signal_process_1() -> None:
    os.kill(1, 0)


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _start_a_thread() -> None:
    _thread.start_new_thread(int, ())


def _execute() -> None:
    os.execve("/bin/true", ["true"], {})


def _trace_the_zygote() -> None:
    kernel.system_call(101 if _X86_64 else 117, _PTRACE_ATTACH, os.getppid(), 0, 0)


def _read_the_zygotes_memory() -> None:
    place = ctypes.create_string_buffer(8)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(place), 8)
    address = ctypes.addressof(vector)
    kernel.system_call(310 if _X86_64 else 270, os.getppid(), address, 1, address, 1, 0)


def _forge_a_report() -> None:
    os.write(_REPORT, bytes(REPORT.size))


def _take_the_next_order() -> None:
    os.read(_CONTROL, 1)


def _write_to_the_terminal() -> None:
    os.write(2, b"escaped")


def _run_memory_as_code() -> None:
    address = kernel.system_call(9 if _X86_64 else 222, 0, 4096, 7, 0x22, -1, 0)
    ctypes.string_at(address, 1)


def _take_more_memory_than_allowed() -> None:
    held = [bytes(1 << 24) for _ in range(1 << 14)]  # 256 GiB of zeros, which are taken only when looked at
    held.clear()


def _change_namespaces() -> None:
    kernel.unshare(kernel.NAMESPACES["user"])


def _ask_io_uring() -> None:
    kernel.system_call(425, 1, ctypes.addressof(ctypes.create_string_buffer(256)))


def _load_bpf() -> None:
    kernel.system_call(321 if _X86_64 else 280, 0, 0, 0)


def _make_memory_file() -> None:
    kernel.system_call(319 if _X86_64 else 279, ctypes.addressof(ctypes.create_string_buffer(b"m")), 0)


def _loop_for_ever() -> None:
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue


CANARIES: Final[dict[str, Callable[[], None]]] = {
    attempt.__name__.strip("_").replace("_", " "): attempt
    for attempt in (
        _read_file,
        _write_file,
        _list_root,
        _make_directory,
        _open_a_socket,
        _signal_the_zygote,
        _signal_everybody,
        _signal_process_1,
        _fork,
        _start_a_thread,
        _execute,
        _trace_the_zygote,
        _read_the_zygotes_memory,
        _forge_a_report,
        _take_the_next_order,
        _write_to_the_terminal,
        _run_memory_as_code,
        _take_more_memory_than_allowed,
        _change_namespaces,
        _ask_io_uring,
        _load_bpf,
        _make_memory_file,
        _loop_for_ever,
    )
}
