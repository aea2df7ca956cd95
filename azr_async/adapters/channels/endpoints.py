"""ZeroMQ addresses and sockets: which are allowed, and what to do when one cannot be had."""

import asyncio
import errno
import ipaddress
import socket as sockets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Final

import zmq
import zmq.asyncio

from azr_async.errors import ConfigError

LONGEST_IPC_PATH_BYTES: Final = 107
"""What a unix socket's address holds."""

ZmqContext = zmq.asyncio.Context

MOST_SOCKETS: Final = 8192
"""Of one context: a sending end takes three, and a run may have 1,024 workers; ZeroMQ's own limit is 1,023."""

LINGER_MS: Final = 500
"""How long closing waits for bytes that the operating system has not taken yet."""


def checked_endpoint(endpoint: str) -> str:
    """The endpoint as ZeroMQ wants it, if it cannot be reached from another host.

    Raises:
        ConfigError: neither `ipc://` with a usable path nor `tcp://` on a loopback address.
    """
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        return f"ipc://{_checked_path(rest, endpoint)}"
    host, _, port = rest.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    if scheme != "tcp" or not _is_loopback(host):
        raise ConfigError(
            f"{endpoint} is not a local address: channels are neither encrypted nor authenticated, so they stay on "
            "this host. Use ipc:///some/path or tcp://127.0.0.1:PORT."
        )
    if port != "*" and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"{endpoint} has no usable port. Give 1 to 65535, or * to let the system pick one.")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


@asynccontextmanager
async def shared_context() -> AsyncIterator[ZmqContext]:
    """One ZeroMQ context for many sending ends, which have to be left before this one is.

    Each context has two threads: with 256 of them, waking these costs more than what they carry.
    """
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
    try:
        yield context
    finally:
        await asyncio.to_thread(context.term)


@asynccontextmanager
async def open_socket(kind: int, endpoint: str, context: ZmqContext | None = None) -> AsyncIterator[zmq.asyncio.Socket]:
    """A socket. With a context of its own, its address is free again when this returns.

    Queues are unlimited here because credits limit what can be in them.
    """
    async with shared_context() if context is None else nullcontext(context) as used:
        with _open(used, kind, endpoint) as socket:
            yield socket


@contextmanager
def _open(context: ZmqContext, kind: int, endpoint: str) -> Iterator[zmq.asyncio.Socket]:
    socket = context.socket(kind)
    try:
        socket.set(zmq.LINGER, LINGER_MS)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.RECONNECT_IVL, 20)
        socket.set(zmq.IPV6, int("[" in endpoint))
        yield socket
    finally:
        socket.close()


@contextmanager
def connection_news(socket: zmq.asyncio.Socket) -> Iterator[zmq.asyncio.Socket]:
    """Where ZeroMQ tells when a connection of `socket` breaks; for `broken`."""
    news = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        yield news
    finally:
        socket.disable_monitor()
        news.close(0)


async def broken(news: zmq.asyncio.Socket) -> None:
    """Wait until a connection breaks."""
    await news.recv_multipart()


def post(socket: zmq.asyncio.Socket, *frames: bytes) -> None:
    """Hand over a message without waiting, so it is whole or nothing. One for a peer that has gone is dropped."""
    handed_over = socket.send_multipart(frames, flags=zmq.DONTWAIT)
    assert isinstance(handed_over, asyncio.Future)
    handed_over.result()


@contextmanager
def bound(socket: zmq.asyncio.Socket, endpoint: str) -> Iterator[str]:
    """Listen at `endpoint`; gives the address as bound (the port that `*` became). Takes its socket file away again.

    Raises:
        ConfigError: the address is in use or cannot be had.
    """
    path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
    # ZeroMQ would take a socket file away from a living owner without a word.
    if path and _is_answering(path):
        raise ConfigError(_in_use(endpoint))
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise ConfigError(_in_use(endpoint)) from problem
        raise ConfigError(f"cannot listen on {endpoint}: {problem.strerror}. Choose another address.") from problem
    try:
        if path:
            path.chmod(0o600)
        yield socket.get_string(zmq.LAST_ENDPOINT)
    finally:
        if path:
            path.unlink(missing_ok=True)


def _checked_path(path: str, endpoint: str) -> str:
    if not path or path.startswith("@") or path == "*":
        raise ConfigError(f"{endpoint} names no file. Use ipc:// and a path, such as ipc:///tmp/run/jobs.sock.")
    if len(path.encode()) > LONGEST_IPC_PATH_BYTES:
        raise ConfigError(
            f"{endpoint} is too long: {len(path.encode())} bytes, a unix socket takes {LONGEST_IPC_PATH_BYTES}. "
            "Choose a shorter --output folder or a path under /tmp."
        )
    if not Path(path).parent.is_dir():
        raise ConfigError(f"{endpoint}: there is no folder {Path(path).parent}. Make it or choose another path.")
    return path


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_answering(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _in_use(endpoint: str) -> str:
    return f"{endpoint} is in use by another process. Stop that process or choose another port or path."
