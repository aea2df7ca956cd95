"""What a push of weights leaves in metrics.jsonl. A real process receives them."""

from pathlib import Path

import pytest

from azr_async.programs.learner_metrics import Push
from tests.programs.push_worker import WIDTH, push_worker
from tests.programs.test_learner import Peers, lines_of
from tests.programs.test_learner_losses import run_with, two_workers
from tests.random_models import random_model


async def test_each_push_says_how_much_was_sent_and_how_fast(tmp_path: Path) -> None:
    config = two_workers(tmp_path, placement={"inference_workers": 1})
    peers = Peers(config, tmp_path / "wires")
    with push_worker("inference-0", config, peers.wires_dir):
        await run_with(peers, tmp_path)
    model_bytes = sum(p.nbytes for p in random_model("qwen2-tied", seed=5, intermediate_size=WIDTH).parameters())
    pushes = [line["weights"] for line in lines_of(tmp_path)]
    assert pushes
    for push in pushes:
        assert push["megabytes"] * 1e6 == pytest.approx(model_bytes, rel=0.03)  # padding, and the heads of the buckets
        assert 0 < push["transfer_seconds"] < push["push_seconds"]
        assert push["megabytes_per_second"] == pytest.approx(push["megabytes"] / push["transfer_seconds"])


def test_a_push_to_nobody_has_no_bandwidth() -> None:
    assert Push().megabytes_per_second is None
