"""What the same rollouts cost without our channels: raw pyzmq, and HTTP with JSON as others stream them.

Senders keep one socket per engine and prepare their bytes beforehand, so that only the receiver's cost differs. Each
receiver runs in a process of its own and says what it measured.
"""

import asyncio
import http.client
import itertools
import json
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import uvloop
import zmq

from azr_async.adapters.channels import wire
from azr_async.messages import Completion, GenerationResults

STAMP: Final = struct.Struct("<q")
DEADLINE_MS: Final = 20_000


@dataclass
class Meter:
    """Counts rollouts as they arrive; the first `warm_seconds` do not count."""

    seconds: float
    warm_seconds: float = 1.0
    latencies_ms: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    """Ten readings over the measured time."""
    rollouts: int = 0
    _first_seconds: float = 0.0
    _began_seconds: float = 0.0
    _cpu_seconds: float = 0.0

    def arrived(self, sent_ns: int) -> bool:
        """Count a rollout that was sent at a moment of this host's monotonic clock. False: that was the last one."""
        now = time.monotonic()
        self._first_seconds = self._first_seconds or now
        if now < self._first_seconds + self.warm_seconds:
            return True
        if not self._began_seconds:
            self._began_seconds, self._cpu_seconds = now, time.process_time()
        self.rollouts += 1
        self.latencies_ms.append(1e3 * now - sent_ns / 1e6)
        if (now - self._began_seconds) * 10 >= self.seconds * len(self.resident_mb):
            self.resident_mb.append(psutil.Process(os.getpid()).memory_info().rss / 1e6)
        return now < self._began_seconds + self.seconds

    def result(self) -> dict[str, Any]:
        """What was measured."""
        seconds, cpu = time.monotonic() - self._began_seconds, time.process_time() - self._cpu_seconds
        p50, p99 = np.percentile(self.latencies_ms, (50, 99))
        return {
            "rollouts_per_second": self.rollouts / seconds,
            "cpu_microseconds": 1e6 * cpu / self.rollouts,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "resident_mb": self.resident_mb,
        }


def rollout_bytes(tokens: int, prompt_tokens: int, text: str) -> tuple[bytes, bytes]:
    """The same completion as our message and as JSON."""
    ids = np.arange(tokens, dtype=np.int32)
    completion = Completion(
        job_id=1,
        index=0,
        finish="stop",
        text=text,
        prompt_ids=ids[:prompt_tokens],
        token_ids=ids,
        behavior_logp=-np.random.default_rng(1).exponential(size=tokens).astype(np.float32),
        token_version=np.zeros(tokens, np.int32),
    )
    fields = {name: getattr(completion, name) for name in completion.__dataclass_fields__}
    lists = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    message = GenerationResults(worker="inference-0", completions=(completion,), busy_seconds=1.0, generated_tokens=1)
    return wire.encode(message), json.dumps(lists).encode()


def zeromq_receiver(endpoint: str, seconds: float) -> dict[str, Any]:
    """PULL, whole messages, nothing decoded: the floor of any channel over ZeroMQ."""
    context = zmq.Context()
    with context.socket(zmq.PULL) as socket:
        socket.set(zmq.RCVTIMEO, DEADLINE_MS)
        socket.set(zmq.LINGER, 0)
        socket.bind(endpoint)
        meter = Meter(seconds)
        while meter.arrived(STAMP.unpack(socket.recv_multipart()[0])[0]):
            pass
        result = meter.result()
    context.term()
    return result


def zeromq_sender(endpoint: str, engines: int, pause_seconds: float, payload: bytes) -> None:
    """So many PUSH sockets in turn, until this process is killed."""
    context = zmq.Context()
    sockets = []
    for _ in range(engines):
        sockets.append(context.socket(zmq.PUSH))
        sockets[-1].set(zmq.SNDHWM, 8)
        sockets[-1].connect(endpoint)
    for socket in itertools.cycle(sockets):
        socket.send_multipart([STAMP.pack(time.monotonic_ns()), payload], copy=False)
        if pause_seconds:
            time.sleep(pause_seconds)


def http_receiver(endpoint: str, seconds: float) -> dict[str, Any]:
    """Keep-alive POSTs at a socket file; JSON to arrays."""
    return uvloop.run(_serve_http(Path(endpoint.removeprefix("ipc://")), seconds))


def http_sender(endpoint: str, engines: int, pause_seconds: float, payload: bytes) -> None:
    """So many open connections in turn, until this process is killed."""
    path = endpoint.removeprefix("ipc://")
    ended = time.monotonic() + DEADLINE_MS / 1e3
    connections = [_UnixConnection(path, ended) for _ in range(engines)]
    with suppress(ConnectionError, http.client.HTTPException):  # the receiver has enough
        for connection in itertools.cycle(connections):
            headers = {"Content-Type": "application/json", "X-Sent": str(time.monotonic_ns())}
            connection.request("POST", "/rollout", payload, headers)
            connection.getresponse().read()
            if pause_seconds:
                time.sleep(pause_seconds)


FLOORS: Final[dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., None]]]] = {
    "raw pyzmq": (zeromq_receiver, zeromq_sender),
    "HTTP+JSON": (http_receiver, http_sender),
}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket file, which is also what ZeroMQ uses here."""

    def __init__(self, path: str, ended: float) -> None:
        super().__init__("localhost")
        self._path, self._ended = path, ended

    def connect(self) -> None:
        import socket

        self.sock = socket.socket(socket.AF_UNIX)
        while True:
            try:
                return self.sock.connect(self._path)
            except OSError:
                if time.monotonic() > self._ended:
                    raise
                time.sleep(0.05)  # the receiver is still starting


async def _serve_http(path: Path, seconds: float) -> dict[str, Any]:
    meter, over = Meter(seconds), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled when all is over; asyncio's streams would print that as an error of each connection.
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while not over.is_set():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                lists = json.loads(await reader.readexactly(int(headers["content-length"])))
                for name, dtype in (
                    ("token_ids", np.int32),
                    ("behavior_logp", np.float32),
                    ("token_version", np.int32),
                ):
                    np.array(lists[name], dtype)
                if not meter.arrived(int(headers["x-sent"])):
                    over.set()
                writer.write(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_unix_server(answer, path, limit=2**22)
    async with server, asyncio.timeout(DEADLINE_MS / 1e3 + seconds):
        await over.wait()
        result = meter.result()
        server.close()
    return result
