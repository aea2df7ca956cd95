"""The files that a configuration names: are they there, and are they what they should be? Asked before a run starts."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from azr_async.config import Config
from azr_async.errors import AzrError
from azr_async.programs.folders import BEGUN_FROM_FILE, BOOKS
from azr_async.programs.mailbox import POINTER
from azr_async.programs.seeds import read_drafts
from azr_async.starter.suite import load_suite

HUB_SECONDS: Final = 5.0
"""How long the hub may take to say whether it has a model."""

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TRACKER_MODULES: Final[Mapping[str, tuple[str, ...]]] = {"tensorboard": ("tensorboard", "tensorboardX")}
_UNFINISHED: Final = ("config.yaml", BEGUN_FROM_FILE, "logs", POINTER, "tensorboard", *BOOKS)
"""What a run that ended before its first step leaves behind, beside its journal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubProblem:
    """Why a model cannot be had from the hub, with the way out."""

    text: str
    is_of_this_machine: bool
    """The model may well be there: this machine cannot ask."""


def problems(config: Config, output: Path | None) -> Iterator[str]:
    """What is wrong with the files and packages that a run needs, each with the way out."""
    yield from _model_problems(config.model.path)
    if config.library.seed_file is not None:
        yield from _jsonl_problems("library.seed_file", config.library.seed_file, read_drafts, "leave it out")
    suite = config.evaluation.suite
    if suite not in ("starter", "none"):
        yield from _jsonl_problems("evaluation.suite", Path(suite), load_suite, "give `starter` or `none`")
    for name in config.telemetry.trackers:
        if not any(map(find_spec, _TRACKER_MODULES.get(name, (name,)))):
            yield (
                f"telemetry.trackers names {name}, but its package is not installed. "
                f"Run `pip install {name}`, or leave it out."
            )
    if output is not None and not _is_free(output):
        yield f"--output: {output} exists and is not an empty folder. Choose another name, or leave it out."


def hub_problem(path: str) -> HubProblem | None:
    """Can the model be had from the hub, if that is what the path names?

    Asked here because the programs would ask for a minute or more before they give up.
    """
    if path == "starter" or is_dir(expanded(path)) or not is_hub_id(path):
        return None
    from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache  # seldom needed
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return None
        if constants.HF_HUB_OFFLINE:
            return _not_had(path, "cannot be fetched in offline mode", is_of_this_machine=True)
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with urlopen(Request(hf_hub_url(path, "config.json"), headers=headers, method="HEAD"), timeout=HUB_SECONDS):
            return None
    except HFValidationError:
        return _not_had(path, "is not one that the hub allows")
    except HTTPError as error:
        error.close()
        if error.code in (401, 403, 404):
            return _not_had(path, "was not found on the hub, or is not shown without a token (`hf auth login`)")
        return _not_had(path, f"cannot be fetched: the hub answered with status {error.code}", is_of_this_machine=True)
    except OSError as error:
        reason = getattr(error, "reason", error)
        return _not_had(path, f"cannot be fetched: the hub does not answer ({reason})", is_of_this_machine=True)


def is_hub_id(path: str) -> bool:
    """Does it have the form organisation/name?"""
    return _HUB_ID.fullmatch(path) is not None


def is_dir(path: Path) -> bool:
    """No for a name that no file can have, too."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """No for a name that no file can have, too."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def expanded(path: str) -> Path:
    """With `~` written out; as it is when there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _model_problems(path: str) -> Iterator[str]:
    folder = expanded(path)
    if path == "starter":
        return
    if is_dir(folder):
        if not is_file(folder / "config.json"):
            yield f"model.path: {folder} is not a model folder: it has no config.json. Name a folder that has one."
    elif not is_hub_id(path):
        shown = path if path.isprintable() else repr(path)
        yield (
            f"model.path: there is no folder {shown}. Give `starter`, an existing Hugging Face folder, "
            "or a hub id of the form organisation/name."
        )


def _not_had(hub_id: str, why: str, *, is_of_this_machine: bool = False) -> HubProblem:
    text = (
        f"model.path: there is no folder {hub_id} here; taken for a hub id, it {why}, and it was not downloaded "
        "before. Give an existing Hugging Face folder, or another hub id."
    )
    return HubProblem(text=text, is_of_this_machine=is_of_this_machine)


def _jsonl_problems(setting: str, path: Path, read: Callable[[Path], object], way_out: str) -> Iterator[str]:
    if not is_file(path):
        yield f"{setting}: there is no file {path}. Give a JSONL of tasks, or {way_out}."
        return
    try:
        read(path)
    except AzrError as error:
        text = str(error)
        yield text if text.startswith(setting) else f"{setting}: {text}"
    except (UnicodeDecodeError, RecursionError):
        yield f"{setting}: {path} is not a JSONL of tasks. Give one, or {way_out}."


def _is_free(output: Path) -> bool:
    """Not there, empty, or left by a run that has nothing to lose."""
    try:
        if not output.is_dir():
            return not output.exists()
        left = list(output.iterdir())
    except (OSError, ValueError):
        return True  # making the folder will tell what is wrong with it
    is_books = [path.name in _UNFINISHED or path.name.startswith("journal.sqlite") for path in left]
    books = (output / name for name in BOOKS)
    is_runs = (output / "config.yaml").is_file() or [path.name for path in left] == ["logs"]  # killed at once
    return not left or (all(is_books) and is_runs and not any(is_file(b) and b.stat().st_size for b in books))
