"""The command line of tools/run_rounds.py, where it starts nothing."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tools import run_rounds


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("train", "held-out"):
        line = {"id": name, "prompt": "Name a colour.", "constraints": [{"type": "max_words", "limit": 3}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    content = {
        "model": str(tmp_path / "model"),
        "rounds": 1,
        "prompts": {"train": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held-out.jsonl")},
        "slurm": {"common": {"partition": "a"}},
    }
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(content))
    return [str(tmp_path / "rounds.yaml"), "--output", str(tmp_path / "out")]


def test_jobs_are_written_and_submitted(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_rounds.main([*command, "--slurm", "seed=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 batch scripts in ")
    assert lines[1:3] == ["  round-0/held-out", "  round-0/held-out-score after round-0/held-out"]
    assert lines[-1] == f"to submit them: bash {tmp_path / 'out' / 'slurm' / 'submit.sh'}"
    train = (tmp_path / "out" / "slurm" / "05-round-1-train.sh").read_text()
    assert "#SBATCH --partition=a\n" in train
    assert train.rstrip().endswith(f"{' '.join(command)} seed=4 --stage round-1/train --launcher slurm")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["prompts", "slurm"]

    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_rounds.main([*command, "--submit"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no sbatch on this machine; run `bash ")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(
        '#!/bin/bash\necho "$@" >> "$CALLS"; /usr/bin/wc -l < "$CALLS"\n'
    )
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    assert run_rounds.main([*command, "--submit"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "round-1/log-probs 8"
    assert len((tmp_path / "calls").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stage", "round-2/train"], "--stage round-2/train is none of round-0/held-out, "),
        (["--stage", "round-1/train"], "round-1/train needs round-1/score, which is not done; start that first"),
        (["round=2"], "unknown key round; did you mean rounds?"),
        (["sample.top-p=x"], "generate.py does not take these options: argument --top-p: invalid float value: 'x'"),
        (["prompts.limit=2"], "has 1 for 1 rounds of 2; lower prompts.limit or rounds"),
        (["slurm.trian.nodes=2", "--slurm"], "slurm.trian is none of setup, common, sample"),
        (["prompts.train=/no"], "/no: no such file; check the path"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(
    more: list[str], message: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_rounds.main([*command, *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_folder_that_cannot_be_made_is_one_sentence(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert run_rounds.main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
