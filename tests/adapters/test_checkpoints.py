"""Checkpoints: loadable by Hugging Face, complete or absent, checked before they are used."""

import json
import multiprocessing
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from azr_async.adapters import checkpoints
from azr_async.errors import AzrError, CheckpointError
from tests.random_models import byte_tokenizer, random_model

OPTIMIZER = {"model.norm.weight/step": torch.tensor(7.0), "model.norm.weight/exp_avg": torch.arange(5.0)}


def save(
    root: Path,
    step: int,
    *,
    keep: int = 2,
    optimizer: dict[str, Tensor] | None = None,
    seed: int = 0,
    model: PreTrainedModel | None = None,
) -> Path:
    model = model or random_model("qwen2-tied", seed)
    content = content_of(model, step, OPTIMIZER if optimizer is None else optimizer)
    return checkpoints.save(root, content, model=model, tokenizer=byte_tokenizer(), keep=keep)


def content_of(model: PreTrainedModel, step: int, optimizer: dict[str, Tensor]) -> checkpoints.Content:
    return checkpoints.copied(model, optimizer, step=step, version=step, extra={"wall_seconds": 12.5})


def test_a_checkpoint_is_a_model_folder_of_hugging_face(tmp_path: Path) -> None:
    folder = save(tmp_path, 120, seed=3)
    assert folder == tmp_path / "step-000120"
    loaded, expected = AutoModelForCausalLM.from_pretrained(folder), random_model("qwen2-tied", 3)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(loaded.parameters(), expected.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(folder).decode([40, 41]) == byte_tokenizer().decode([40, 41])


def test_a_checkpoint_gives_back_what_a_run_needs(tmp_path: Path) -> None:
    torch.manual_seed(5)
    folder = save(tmp_path, 7)
    drawn = torch.rand(3)
    state = checkpoints.load(folder)
    torch.set_rng_state(state.random_state)
    assert (state.step, state.version, state.extra, state.folder) == (7, 7, {"wall_seconds": 12.5}, folder)
    assert state.optimizer.keys() == OPTIMIZER.keys()
    assert all(torch.equal(state.optimizer[name], OPTIMIZER[name]) for name in OPTIMIZER)
    assert torch.equal(torch.rand(3), drawn)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    assert checkpoints.newest(tmp_path) == tmp_path / "step-1000000"


def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_its_own(tmp_path: Path) -> None:
    for step in (60, 120):
        save(tmp_path, step)
    checkpoints.remove_after(tmp_path, 60)
    for step in (70, 80):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000070", "step-000080"]
    assert checkpoints.newest(tmp_path) == tmp_path / "step-000080"


def test_what_was_just_written_stays_whatever_lies_beside_it(tmp_path: Path) -> None:
    save(tmp_path, 120)
    for step in (60, 70):
        folder = save(tmp_path, step, keep=1)
    checkpoints.verify(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000070", "step-000120"]


def test_there_may_be_nothing_to_remove(tmp_path: Path) -> None:
    checkpoints.remove_after(tmp_path / "missing", 0)
    assert not (tmp_path / "missing").exists()


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 5, seed=1)
    folder = save(tmp_path, 5, seed=2)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight,
        random_model("qwen2-tied", 2).get_input_embeddings().weight,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_the_oldest_step_is_that_of_the_oldest_that_is_left(tmp_path: Path) -> None:
    assert checkpoints.oldest_step(tmp_path / "missing") == 0
    for step in (5, 10, 15):
        save(tmp_path, step, keep=2)
    assert checkpoints.oldest_step(tmp_path) == 10


def test_there_is_no_newest_of_nothing(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "missing") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "resume.json", "tokenizer.json"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newer / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*Delete the folder {newer} and resume from {older}"):
        checkpoints.load(newer)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing.*start a new run"):
        checkpoints.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}}', '{"format": 99, "files": {}}'])
def test_a_damaged_manifest_is_told(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest.json"):
        checkpoints.load(folder)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"no checkpoint {tmp_path / 'step-000009'}. Resume from {folder}"):
        checkpoints.load(tmp_path / "step-000009")


def test_an_unfinished_checkpoint_of_a_killed_run_does_not_count(tmp_path: Path) -> None:
    draft = tmp_path / ".step-000003.writing"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    assert checkpoints.newest(tmp_path) is None
    save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def save_for_ever(root: Path, acknowledge: Connection) -> None:
    model, optimizer = random_model("qwen2-tied", 0), {"big": torch.zeros(4_000_000)}
    for step in range(1, 1000):
        save(root, step, optimizer=optimizer, model=model)
        acknowledge.send(step)


@pytest.mark.parametrize("seen", ["config.json", "model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_writer_that_is_killed_leaves_the_last_one_whole(tmp_path: Path, seen: str) -> None:
    """At once when this file of the third one appears: between two files, or before it gets its name."""
    told, acknowledge = multiprocessing.Pipe(duplex=False)
    # Not a fork: a killed one could take a lock with it that all forks share, such as tqdm's.
    writer = multiprocessing.get_context("spawn").Process(target=save_for_ever, args=(tmp_path, acknowledge))
    writer.start()
    try:
        acknowledge.close()
        assert [told.recv(), told.recv()] == [1, 2]
        end = time.monotonic() + 30.0
        while not (tmp_path / ".step-000003.writing" / seen).exists() and not told.poll():
            assert time.monotonic() < end
    finally:
        writer.kill()
        writer.join(20.0)
    newest = checkpoints.newest(tmp_path)
    assert newest is not None
    assert newest.name in ("step-000002", "step-000003")  # the name may have been quicker than the signal
    checkpoints.verify(newest)
    save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_a_failure_in_the_middle_leaves_nothing_and_keeps_the_old_one(tmp_path: Path) -> None:
    older = save(tmp_path, 1)
    unsavable = {"x": torch.ones(3).to_sparse()}
    with pytest.raises(RuntimeError, match="memory format"):
        save(tmp_path, 2, optimizer=unsavable)
    assert list(tmp_path.iterdir()) == [older]
    checkpoints.verify(older)


FULL_DISK = """
import sys
from pathlib import Path
import torch
from azr_async.errors import AzrError
from tests.adapters.test_checkpoints import save
root = Path(sys.argv[1])
save(root, 1)
try:
    save(root, 2, optimizer={"big": torch.zeros(2_000_000)})
except AzrError as error:
    print(error)
print(sorted(path.name for path in root.iterdir()))
"""


def test_a_full_disk_is_told_and_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=4m none {tmp_path} && exec {sys.executable} -c '{FULL_DISK}' {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if (done.returncode and "unshare" in done.stderr + done.stdout) or "mount:" in done.stderr:
        pytest.skip("this machine does not let a test mount a small disk")
    message, left = done.stdout.splitlines()
    assert "the disk is full" in message
    assert "step-000002 could not be written, and nothing of it is left" in message
    assert json.loads(left.replace("'", '"')) == ["step-000001"]
    assert issubclass(CheckpointError, AzrError)
