"""What the command says where no run is started, or none ends well."""

from pathlib import Path

import pytest

from mpo_megatron.comparison import execute
from mpo_megatron.runtime.commands import ROOT
from tools.compare_objectives import main

FILE = str(ROOT / "conf" / "compare" / "objectives.yaml")
MODEL = f"model.restore_from_path={ROOT}"


def test_wrong_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["absent.yaml", "--output", "out"], "error: absent.yaml cannot be read: "),
        ([FILE, "--output", "out", "--members", "dop"], "error: --members: dop is no member"),
        ([FILE, "--output", "out", "--members", "dpo", "beta"], "error: the command: beta is no override"),
        (
            [FILE, "--output", str(tmp_path / "file"), MODEL],
            f"error: --output {tmp_path / 'file'} cannot be made: ",
        ),
    ):
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith(message)
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_all_members_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.py").write_text("import sys\nsys.exit('error: the weights are not all there')\n")
    monkeypatch.setattr(execute, "JOB", tmp_path / "job.py")
    output = tmp_path / "out"
    assert main([FILE, "--output", str(output), "--members", "sft", MODEL]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "[1/1] sft, seed 1234: failed: the weights are not all there "
        f"(its output: {output}/sft/seed-1234/job.log)"
    )
    assert "sft, seed 1234 failed: the weights are not all there" in rest
    assert {path.name for path in output.iterdir()} == {"sft", "comparison.csv", "comparison.md"}


def test_no_run_is_begun_after_so_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main([FILE, "--output", str(output), "--members", "sft,dpo", "--max-hours", "0", MODEL]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "2 of 2 runs are left; the same command goes on with them"
    )
    assert not (output / "sft").exists()
