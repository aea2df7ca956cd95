"""Orders for more or fewer workers: what is refused and why, and how they reach the launcher."""

import asyncio
import json
from pathlib import Path

import pytest

from azr_async.config import Config, PlacementConfig
from azr_async.errors import ConfigError
from azr_async.programs.mailbox import POINTER, SOCKET, WorkersOrder, ask, mailbox
from azr_async.programs.placement import place, place_another


async def carry_out(order: WorkersOrder) -> str:
    if order.add > 2:
        raise ConfigError("no room. Ask for less.")
    return f"{order.add} {order.remove} {order.total}"


def folders(tmp_path: Path) -> tuple[Path, Path]:
    run_dir, wires_dir = tmp_path / "run", tmp_path / "w"
    run_dir.mkdir()
    wires_dir.mkdir()
    return run_dir, wires_dir


async def test_an_order_is_carried_out_and_answered(tmp_path: Path) -> None:
    run_dir, wires_dir = folders(tmp_path)
    async with mailbox(run_dir, wires_dir, carry_out):
        assert (wires_dir / SOCKET).stat().st_mode & 0o777 == 0o600
        assert await ask(run_dir, WorkersOrder(add=2), deadline_seconds=5.0) == "2 () None"
        assert await ask(run_dir, WorkersOrder(remove=("inference-1",)), deadline_seconds=5.0) == (
            "0 ('inference-1',) None"
        )
        with pytest.raises(ConfigError, match=r"^no room\. Ask for less\.$"):
            await ask(run_dir, WorkersOrder(add=3), deadline_seconds=5.0)
    with pytest.raises(ConfigError, match="no run is going on in"):
        await ask(run_dir, WorkersOrder(add=1), deadline_seconds=5.0)


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b'{"add": "many"}\n', b'{"add": 1, "shell": "x"}\n', b'{"add": -1}\n']
)
async def test_what_is_no_order_is_refused(tmp_path: Path, line: bytes) -> None:
    run_dir, wires_dir = folders(tmp_path)
    async with mailbox(run_dir, wires_dir, carry_out):
        reader, writer = await asyncio.open_unix_connection(wires_dir / SOCKET)
        writer.write(line)
        answer = json.loads(await reader.readline())
        writer.close()
    assert not answer["is_done"]
    assert "this is no order" in answer["text"]


async def test_a_launcher_that_does_not_answer_is_told(tmp_path: Path) -> None:
    run_dir, wires_dir = folders(tmp_path)

    async def never(order: WorkersOrder) -> str:
        await asyncio.Event().wait()
        return ""

    async with mailbox(run_dir, wires_dir, never):
        with pytest.raises(ConfigError, match=r"did not answer within 0\.2 s"):
            await ask(run_dir, WorkersOrder(add=1), deadline_seconds=0.2)


def test_a_pointer_that_leads_nowhere_is_no_run(tmp_path: Path) -> None:
    (tmp_path / POINTER).write_text(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="no run is going on"):
        asyncio.run(ask(tmp_path, WorkersOrder(add=1), deadline_seconds=1.0))


def test_one_more_worker_goes_where_nobody_is() -> None:
    config = Config(placement=PlacementConfig(inference_gpus=2, train_gpus=1))
    assert [placed.gpus for placed in place(config)[:2]] == [(0,), (1,)]
    assert place_another(config, 2, {0, 1, 2}, found=4).gpus == (3,)
    assert place_another(config, 3, {0, 2}, found=3).gpus == (1,)
    with pytest.raises(ConfigError, match="inference-4 needs 1 free GPU, but of the 3 GPUs"):
        place_another(config, 4, {0, 1, 2}, found=3)
    assert place_another(Config(), 1, (), found=0).gpus == ()
