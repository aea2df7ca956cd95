"""What every program of a run shares: where its sockets are, its log, its signals, its way to report and to fail.

`config.yaml`, `logs/` and everything else of a run live in its run directory; socket files live in the
`wires` folder, a private folder that exists only while the run does.
"""

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import uvloop
import yaml
from pydantic import ValidationError

from azr_async.adapters.channels import ZmqSender, zmq_sender
from azr_async.config import Config
from azr_async.errors import AzrError, ChannelClosed, ConfigError, PeerVanished
from azr_async.messages import Progress
from azr_async.programs.leash import die_with_parent

CONFIG_FILE: Final = "config.yaml"
LAUNCHER_PID_FILE: Final = "launcher.pid"
DESCRIPTORS: Final = 65_536
"""Files and sockets that a program may have open, unless the host allows fewer."""
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_FIXED_NAMES: Final = ("launcher", "selfplay-results", "selfplay-requests", "learner-batches", "learner-weights")
_INFERENCE_NAME: Final = re.compile(r"inference-(\d+)-(jobs|push)")
_FIRST_INFERENCE_PORT: Final = 16
_LONGEST_SOCKET_PATH: Final = 100  # Linux allows 107 bytes

log = logging.getLogger(__name__)


def endpoint(config: Config, wires_dir: Path, name: str) -> str:
    """The ZeroMQ address of one wire: a socket file in `wires_dir`, or a loopback port.

    Names: `launcher`, `selfplay-results`, `selfplay-requests`, `learner-batches`, `learner-weights`,
    `inference-<i>-jobs`, `inference-<i>-push`.

    Raises ConfigError for an unknown name, or a folder whose path is too long for a socket file.
    """
    offset = _port_offset(name)
    if config.wires.transport == "tcp":
        return f"tcp://127.0.0.1:{config.wires.base_port + offset}"
    path = wires_dir.absolute() / name
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"the socket path {path} is longer than {_LONGEST_SOCKET_PATH} bytes. Set TMPDIR to a folder with a "
            "shorter name, or use --wires.transport tcp."
        )
    return f"ipc://{path}"


def endpoint_names(config: Config) -> list[str]:
    """Every wire that a run of this configuration uses."""
    workers = range(config.inference_workers)
    return [*_FIXED_NAMES, *(f"inference-{i}-{end}" for i in workers for end in ("jobs", "push"))]


def load_run_config(run_dir: Path) -> Config:
    """The resolved configuration that the launcher wrote into the run directory.

    Raises ConfigError when it is missing or was damaged.
    """
    path = run_dir / CONFIG_FILE
    try:
        return Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Start the run again with `python run.py`.") from error


def program_parser(description: str) -> argparse.ArgumentParser:
    """The command line of an internal program; the run directory in it shows in `ps` which run it belongs to."""
    parser = argparse.ArgumentParser(description=f"{description} Started by run.py; not meant to be typed.")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run, with config.yaml")
    parser.add_argument("--wires", type=Path, required=True, help="folder of the run's socket files")
    return parser


class Reporter:
    """A program's voice to the launcher, and the launcher's wish to stop it."""

    def __init__(self, process: str) -> None:
        self.process = process
        self.stop_requested = asyncio.Event()
        """Set by SIGTERM: finish the step at hand, write what must be kept, and return."""
        self._latest: Progress | None = None
        self._last: Progress | None = None
        self._news = asyncio.Event()

    def report(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Say what the program is doing. Never blocks: only the newest report is kept until it is sent."""
        self._latest = Progress(process=self.process, phase=phase, done=done, total=total)
        self._news.set()

    def report_again(self) -> None:
        """Say it once more: nobody has heard it, or whoever did has forgotten."""
        self._latest = self._latest or self._last
        self._news.set()

    async def next(self) -> Progress:
        """The newest report that was not yet taken; waits for one."""
        while self._latest is None:
            self._news.clear()
            await self._news.wait()
        latest, self._latest = self._latest, None
        self._last = latest
        return latest


def program_main(
    process: str, run_dir: Path, wires_dir: Path, config: Config, main: Callable[[Reporter], Awaitable[None]]
) -> int:
    """Run one program of a run to its end; returns its exit status.

    The log is `logs/<process>.log`. An AzrError is told in one message, anything else with its traceback, and
    both end with status 1. The first SIGTERM sets `Reporter.stop_requested`, the second cancels `main`. When
    the launcher dies, the kernel kills this process.
    """
    log_path = run_dir / "logs" / f"{process}.log"
    _start_log(log_path)
    allow_descriptors()
    try:
        _die_with_the_launcher(wires_dir)
        uvloop.run(_run(process, wires_dir, config, main))
    except asyncio.CancelledError:
        return _told_to_give_up(process)
    except Exception as error:
        return _failed(process, error, log_path, wires_dir)
    return EXIT_DONE


def allow_descriptors() -> None:
    """Lift the limit that a shell sets, often 1,024, as far as it may be: self-play with 256 workers has 1,366 open."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if most == resource.RLIM_INFINITY else min(DESCRIPTORS, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWords:
    """What a failed program leaves in the wires folder for the launcher."""

    message: str
    is_consequence: bool
    """It failed only because another program went away."""
    at_seconds: float
    """When, on this host's monotonic clock."""


def read_last_words(wires_dir: Path, process: str) -> LastWords | None:
    """Why a program failed, in its own words; None when it had no time to say."""
    try:
        return LastWords(**json.loads((wires_dir / f"{process}.failed").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def forget_last_words(wires_dir: Path, process: str) -> None:
    """Before it is started again: what it said last is not what its successor says."""
    (wires_dir / f"{process}.failed").unlink(missing_ok=True)


def root_causes(error: BaseException) -> list[BaseException]:
    """The errors inside nested groups, the most telling first: a peer that vanished is seldom the cause."""
    leaves = list(_leaves(error))
    return sorted(leaves, key=lambda leaf: isinstance(leaf, PeerVanished | ChannelClosed))


async def _run(process: str, wires_dir: Path, config: Config, main: Callable[[Reporter], Awaitable[None]]) -> None:
    reporter = Reporter(process)
    reporter.report("starting")  # the launcher counts on hearing from every program
    work = asyncio.current_task()
    assert work is not None

    def on_stop_signal() -> None:
        if reporter.stop_requested.is_set():
            work.cancel()
        reporter.stop_requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_stop_signal)
    async with asyncio.TaskGroup() as group:
        forwarding = group.create_task(_forward_reports(reporter, wires_dir, config), name="reports")
        try:
            await main(reporter)
        finally:
            forwarding.cancel()


async def _forward_reports(reporter: Reporter, wires_dir: Path, config: Config) -> None:
    """Reports -> launcher. A launcher that does not listen for a while (its terminal may be held up, or it is stopped)
    costs reports, never the run: it kills who says nothing, so it has to hear of this program again."""
    while True:
        launcher: ZmqSender[Progress] = zmq_sender(
            endpoint(config, wires_dir, "launcher"),
            name=reporter.process,
            peer="launcher",
            heartbeat_seconds=config.wires.heartbeat_seconds,
            peer_timeout_seconds=config.wires.peer_timeout_seconds,
            connect_seconds=config.wires.start_seconds,
        )
        try:
            async with launcher:
                while True:
                    await launcher.send(await reporter.next())
        except ChannelClosed as over:
            log.info("no more reports to the launcher: %s", over)
            return
        except PeerVanished as silence:
            log.warning("%s", silence)
        reporter.report_again()


def _start_log(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    faulthandler.enable()


def _die_with_the_launcher(wires_dir: Path) -> None:
    die_with_parent()
    # The launcher may have died between starting this process and the call above; nothing would tell.
    try:
        launcher_pid = int((wires_dir / LAUNCHER_PID_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):  # another launcher has cleared away what the dead one left
        launcher_pid = None
    if os.getppid() != launcher_pid:
        raise PeerVanished("the launcher of this run is gone. Start the run again with `python run.py`.")


def _failed(process: str, error: Exception, log_path: Path, wires_dir: Path) -> int:
    causes = root_causes(error)
    unexpected = [cause for cause in causes if not isinstance(cause, AzrError)]
    if unexpected:
        log.error("unexpected error", exc_info=unexpected[0] if len(unexpected) == 1 else error)
        kind = type(unexpected[0]).__name__
        message = f"unexpected {kind}: {unexpected[0]}. The traceback is in {log_path}; please report it as a bug."
    else:
        message = "; ".join(dict.fromkeys(str(cause) for cause in causes))
    log.error("%s", message)
    _say_on_stderr(f"{process}: {message}", log_path)
    words = LastWords(
        message=message,
        is_consequence=all(isinstance(cause, PeerVanished | ChannelClosed) for cause in causes),
        at_seconds=time.monotonic(),
    )
    with suppress(OSError):  # the launcher manages without, from the log
        (wires_dir / f"{process}.failed").write_text(json.dumps(asdict(words)), encoding="utf-8")
    return EXIT_FAILED


def _told_to_give_up(process: str) -> int:
    log.warning("%s was told twice to stop and gave up its work", process)
    return 128 + signal.SIGTERM


def _say_on_stderr(message: str, log_path: Path) -> None:
    # The launcher sends stderr into the log, where the message already is.
    if not os.path.samestat(os.fstat(sys.stderr.fileno()), log_path.stat()):
        print(message, file=sys.stderr, flush=True)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _port_offset(name: str) -> int:
    if name in _FIXED_NAMES:
        return _FIXED_NAMES.index(name)
    match = _INFERENCE_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"{name} is not a wire of a run. The wires are {', '.join(_FIXED_NAMES)}, inference-<i>-jobs, -push."
        )
    return _FIRST_INFERENCE_PORT + 2 * int(match[1]) + (match[2] == "push")
