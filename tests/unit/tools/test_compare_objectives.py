"""What the command says where no run is started, or none ends well."""

from pathlib import Path

import pytest
from filelock import FileLock

from mpo_megatron.comparison import execute
from mpo_megatron.comparison.results import FIGURES
from mpo_megatron.runtime.commands import ROOT
from tests.unit.comparison.test_report import GROUP, write_groups
from tools import compare_objectives
from tools.compare_objectives import main

FILE = str(ROOT / "conf" / "compare" / "objectives.yaml")
# A folder whose digest takes no time.
MODEL = f"model.restore_from_path={ROOT / 'conf'}"


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
    assert {path.name for path in output.iterdir()} == {"sft", "comparison.csv", "comparison.md", "lock"}
    with FileLock(output / "lock"):
        assert main([FILE, "--output", str(output), "--members", "sft", MODEL]) == 1
    assert capsys.readouterr().err == (
        f"error: another comparison runs in {output}; wait for it, or give another --output\n"
    )


def test_no_run_is_begun_after_so_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main([FILE, "--output", str(output), "--members", "sft,dpo", "--max-hours", "0", MODEL]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "2 of 2 runs are left; the same command goes on with them"
    )
    assert not (output / "sft").exists()


def test_no_model_is_sampled_after_so_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of a run that has ended are there all the same."""
    file = tmp_path / "some.yaml"
    file.write_text(
        "seeds: [1, 2]\nmembers: {sft: {objective: sft}, dpo: {objective: dpo, beta: 0.1}}\n"
        "samples: {generate: {prompts: p.jsonl}, seeds: [1]}\n"
    )
    output = tmp_path / "out"
    (output / "start").mkdir(parents=True)
    (output / "start" / "samples.json").write_text('{"generate": {"prompts": "p.jsonl"}, "score": {}}')
    (output / "start" / "samples.scored.jsonl").write_text(
        '{"id": "p", "prompt": "Say it.", "responses": [{"text": "It.", "finish_reason": "stop", "score": 3.0}]}\n'
    )
    monkeypatch.setattr(
        compare_objectives, "finished", lambda run, ranks: {**dict.fromkeys(FIGURES, 0.5), "steps": 3}
    )
    for member in ("sft", "dpo"):
        for seed in (1, 2):
            folder = output / member / f"seed-{seed}" / "experiment"
            folder.mkdir(parents=True)
            for step in (0, 3):
                write_groups(folder, step, {**GROUP, "logps": [-1.0 - step, -2.0]})
    assert main([str(file), "--output", str(output), "--max-hours", "0", MODEL]) == 0
    printed = capsys.readouterr().out
    assert "[3/4] sft, seed 2: kept, " in printed
    assert "Not finished: sft, seed 1; dpo, seed 1." in printed
    assert "2 of 4 runs are left" in printed
    rows = (output / "comparison.md").read_text().splitlines()
    assert any(row.startswith("| sft | 2 | ") for row in rows)
    assert "| dpo | sft | 1 | 2 | +0.0% ± – / 0.0% | +0.000 ± – / 0 |" in rows
