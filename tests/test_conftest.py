"""Which tests share a process."""

from tests.conftest import ROOT, WHOLE_RUNS, scope_of


def test_files_stay_together_and_whole_runs_take_turns() -> None:
    assert scope_of("tests/test_resume.py::test_a[x]") == scope_of("tests/test_supervision.py::test_b")
    assert scope_of("tests/stages/test_flow.py::test_c") == "tests/stages/test_flow.py"
    assert all((ROOT / file).is_file() for file in WHOLE_RUNS)
