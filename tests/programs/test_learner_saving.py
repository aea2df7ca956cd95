"""Checkpoints beside training: one at a time, tried again, and nothing that changes later is in them."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from azr_async.adapters import checkpoints
from azr_async.config import Config
from azr_async.errors import CheckpointError
from azr_async.programs.learner_saving import Saver, saving
from tests.random_models import byte_tokenizer, random_model


def content_of(model: PreTrainedModel, step: int = 1) -> checkpoints.Content:
    optimizer = {"x/exp_avg": torch.arange(5.0)}
    return checkpoints.copied(model, optimizer, step=step, version=step, extra={})


def a_saver(write: Callable[[checkpoints.Content], object], *, write_seconds: float = 20.0) -> Saver:
    return Saver(write, Path("checkpoints"), write_seconds=write_seconds)


async def test_what_is_trained_meanwhile_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    model = random_model("qwen2-tied", 3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    async with saving(Config(), tmp_path, model, byte_tokenizer()) as saver:
        saver.begin(content_of(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        await saver.done()
    written = load_file(tmp_path / "step-000001" / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], before[name]) for name in before)
    checkpoints.verify(tmp_path / "step-000001")


async def test_training_goes_on_while_a_disk_is_slow() -> None:
    may_end = threading.Event()
    saver = a_saver(lambda content: may_end.wait(20.0))
    saver.begin(content_of(random_model("qwen2-tied", 1)))
    may_end.set()  # comes to this line although nothing was written
    await saver.done()


async def test_a_full_disk_is_tried_again_and_forgotten_once_it_has_room(caplog: pytest.LogCaptureFixture) -> None:
    attempts, is_written = list[int](), threading.Event()

    def write(content: checkpoints.Content) -> None:
        attempts.append(content.step)
        if len(attempts) < 4:
            raise CheckpointError("the disk is full. Free some space.")
        is_written.set()

    saver = Saver(write, Path("checkpoints"), write_seconds=20.0, retry_seconds=0.01)
    saver.begin(content_of(random_model("qwen2-tied", 1), 7))
    assert await asyncio.to_thread(is_written.wait, 20.0)
    await saver.done()
    assert attempts == [7, 7, 7, 7]
    assert "the disk is full. Free some space. Until the next checkpoint is due, it is tried" in caplog.text


async def test_a_disk_that_stays_full_ends_the_run_when_the_checkpoint_is_needed() -> None:
    attempts = []

    def write(content: checkpoints.Content) -> None:
        attempts.append(content.step)
        raise CheckpointError("the disk is full. Free some space.")

    saver = a_saver(write)
    saver.begin(content_of(random_model("qwen2-tied", 1)))
    with pytest.raises(CheckpointError, match="the disk is full"):
        await saver.done()
    assert 1 <= len(attempts) <= 2  # the last one when it was needed, without waiting for the next round
    await saver.done()  # told once


async def test_a_disk_that_does_not_answer_is_named_after_the_deadline() -> None:
    may_end = threading.Event()
    saver = a_saver(lambda content: may_end.wait(20.0), write_seconds=0.05)
    saver.begin(content_of(random_model("qwen2-tied", 1)))
    with pytest.raises(CheckpointError, match=r"not written within 0.05 s. Look whether its disk answers"):
        await saver.done()
    may_end.set()


async def test_who_is_cancelled_while_it_waits_leaves_the_checkpoint_to_the_end_of_the_run() -> None:
    may_end, written = threading.Event(), list[int]()

    def write(content: checkpoints.Content) -> None:
        may_end.wait(20.0)
        written.append(content.step)

    saver = a_saver(write)
    saver.begin(content_of(random_model("qwen2-tied", 1), 7))
    waiting = asyncio.ensure_future(saver.done())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    may_end.set()
    await saver.done()
    assert written == [7]


async def test_a_run_that_fails_still_gets_its_checkpoint_and_tells_its_own_error(tmp_path: Path) -> None:
    model = random_model("qwen2-tied", 3)

    async def fail() -> None:
        async with saving(Config(), tmp_path, model, byte_tokenizer()) as saver:
            saver.begin(content_of(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    checkpoints.verify(tmp_path / "step-000001")


async def test_what_fails_in_the_thread_reaches_the_run() -> None:
    def write(content: checkpoints.Content) -> None:
        raise RuntimeError("unforeseen")

    saver = a_saver(write)
    saver.begin(content_of(random_model("qwen2-tied", 1)))
    with pytest.raises(RuntimeError, match="unforeseen"):
        await saver.done()
