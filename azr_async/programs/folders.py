"""The two folders of a run: the one that stays, with its results, and the private one for sockets that goes with it."""

import errno
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final, TextIO

import yaml

from azr_async.config import Config
from azr_async.errors import ConfigError
from azr_async.programs.wiring import CONFIG_FILE, LAUNCHER_PID_FILE

WIRES_PREFIX: Final = "azr-"
JOURNAL_FILE: Final = "journal.sqlite"
BEGUN_FROM_FILE: Final = "begun-from"
BOOKS: Final = ("metrics.jsonl", "evaluations.jsonl")


def new_run_dir(name: str) -> Path:
    """`runs/<time>-<name>`, which does not exist yet."""
    path = Path("runs") / f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{name}"
    others = (path.with_name(f"{path.name}-{n}") for n in range(2, 1000))
    return path if not path.exists() else next(other for other in others if not other.exists())


def config_text(config: Config) -> str:
    """The resolved configuration as YAML that `--config` takes back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def forget_beginning(run_dir: Path) -> None:
    """Take away what a run that ended before its first step has found, for one that starts anew in its folder."""
    for path in (*run_dir.glob(f"{JOURNAL_FILE}*"), run_dir / BEGUN_FROM_FILE):
        path.unlink(missing_ok=True)


def begun_from(run_dir: Path) -> Path | None:
    """The checkpoint of another folder that the run began with, if that is how it began."""
    try:
        return Path((run_dir / BEGUN_FROM_FILE).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None


def claimed_run_dir(
    run_dir: Path, config: Config, history_from: Path | None = None, checkpoint: Path | None = None
) -> TextIO:
    """Make the run's folder with `logs/` and `config.yaml`; other launchers stay out until the result is closed.

    Args:
        run_dir: new, empty, or the folder of the run that goes on.
        config: what to write into it. It comes last and whole: a folder that has it has all the rest.
        history_from: another run's folder whose journal and metrics are copied, for a run that branches off.
        checkpoint: of another folder, for a run that begins with it.

    Raises ConfigError when the folder cannot be written, or a run is going on in it.
    """
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "logs" / "launcher.lock").open("w", encoding="ascii")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if checkpoint is not None:
                _write_whole(run_dir, BEGUN_FROM_FILE, f"{checkpoint}\n")
            if history_from is not None:
                _copy_history(history_from, run_dir)
            _write_whole(run_dir, CONFIG_FILE, config_text(config))
        except BaseException:
            lock.close()
            raise
    except BlockingIOError:
        raise ConfigError(f"another run is going on in {run_dir}. Stop it, or choose another --output.") from None
    except OSError as error:
        raise ConfigError(
            f"the run directory {run_dir} cannot be written: {error.strerror}. {_way_out(error)}"
        ) from None
    return lock


def _write_whole(run_dir: Path, name: str, text: str) -> None:
    """The old content stays until the new one is on the disk; a full one shows here, not minutes later."""
    draft = run_dir / "logs" / f"{name}.draft"
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(run_dir / name)


def _copy_history(old_dir: Path, run_dir: Path) -> None:
    """The old run may be going on: lines that are not complete are cut off later, the journal copies itself whole."""
    for name in BOOKS:
        with suppress(FileNotFoundError):
            shutil.copyfile(old_dir / name, run_dir / name)
    journal = old_dir.absolute() / JOURNAL_FILE
    if not journal.exists():
        return
    try:
        with (
            closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(run_dir / JOURNAL_FILE)) as new,
        ):
            old.backup(new)
    except sqlite3.Error as error:
        raise ConfigError(
            f"the tasks in {journal} cannot be copied: {error}. Leave --output out to go on in the old folder."
        ) from error


@contextmanager
def private_wires_dir() -> Iterator[Path]:
    """A folder for socket files that only this user can enter; gone afterwards.

    Also removes those whose launcher was killed too suddenly to do so.
    """
    for pid_file in Path(tempfile.gettempdir()).glob(f"{WIRES_PREFIX}*/{LAUNCHER_PID_FILE}"):
        _remove_if_abandoned(pid_file)
    wires_dir = Path(tempfile.mkdtemp(prefix=WIRES_PREFIX))
    try:
        with (wires_dir / LAUNCHER_PID_FILE).open("w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when the launcher dies, however it does
            lock.write(str(os.getpid()))
            lock.flush()
            yield wires_dir
    finally:
        shutil.rmtree(wires_dir, ignore_errors=True)


def _way_out(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free some space there, or choose another folder with --output."
    return "Choose another folder with --output."


def _remove_if_abandoned(pid_file: Path) -> None:
    with suppress(OSError), pid_file.open("r+", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock.read():  # empty: its launcher is about to lock it
            shutil.rmtree(pid_file.parent, ignore_errors=True)
