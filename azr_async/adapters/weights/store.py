"""The key-value store over which the ranks of a weight group find each other, and tell how far they are."""

import errno
import ipaddress
import socket
from collections.abc import Collection
from datetime import timedelta
from typing import Final

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from azr_async.errors import ConfigError, WeightsError

_ANSWER_SECONDS: Final = 30.0
"""A store that is there answers much sooner."""


def host_store(host: str, port: int) -> TCPStore:
    """Keep the store in this process, reachable at `host` only; port 0 takes a free one (see `.port`).

    Raises ConfigError when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as problem:
        listener.close()
        if problem.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use, so the weights cannot be sent from there. "
                "Stop the program that uses it, or set weights.port to another port or to 0, which picks a free one."
            ) from problem
        raise ConfigError(
            f"cannot listen on {host}:{port} for the weight group: {problem.strerror}. "
            "Set weights.port to another port or to 0, which picks a free one."
        ) from problem
    # TCPStore by itself would listen on every interface of the host.
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=_ANSWER_SECONDS),
        master_listen_fd=listener.detach(),
    )


def connect_store(host: str, port: int, deadline_seconds: float) -> TCPStore:
    """Reach the learner's store. Raises WeightsError when it does not answer in time."""
    try:
        return TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=deadline_seconds)
        )
    except RuntimeError as problem:
        raise WeightsError(
            f"the learner's weight store at {host}:{port} did not answer within {deadline_seconds:g} s. "
            "Look into the learner's log; is the port reachable from this host?"
        ) from problem


def own_address(store: TCPStore) -> str:
    """The address at which this host is seen from the store's host."""
    family = socket.AF_INET6 if ":" in store.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((store.host, store.port))  # picks a route, sends nothing
        return str(ipaddress.ip_address(probe.getsockname()[0]))


def missing_keys(store: Store, keys: Collection[str], wait_seconds: float) -> list[str]:
    """Wait until all keys are set; which are not when the time is up. Raises RuntimeError when the store is gone."""
    if not keys:
        return []
    try:
        store.wait(list(keys), timedelta(seconds=wait_seconds))
    except RuntimeError:
        return [key for key in keys if not store.check([key])]
    return []
