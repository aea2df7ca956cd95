"""`python -m azr_async starter`, from nothing to a folder that loads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from azr_async.programs.starter import main
from azr_async.starter.suite import STARTER_SUITE, load_suite

FEW_STEPS = ["--warm-steps", "2", "--noise-steps", "1", "--measured-problems", "9"]


def test_the_folder_holds_a_model_its_tokenizer_and_the_suite(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "starter"
    assert main(["--output", str(folder), *FEW_STEPS]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    assert load_suite(folder / "heldout.jsonl") == load_suite(STARTER_SUITE)
    assert [path.name for path in folder.parent.iterdir()] == ["starter"]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), *FEW_STEPS]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--warm-steps", "-1"], ["--seed", "one"], ["--faster"]])
def test_wrong_usage_is_exit_status_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file" / "starter"), *FEW_STEPS]) == 1
    assert "could not write" in capsys.readouterr().err
