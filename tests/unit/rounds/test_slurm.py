"""Batch scripts, and a stand-in for sbatch that notes what it is given."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mpo_megatron.errors import UserError
from mpo_megatron.rounds import slurm, state
from mpo_megatron.rounds.execute import command_line
from mpo_megatron.rounds.stages import JOB, Command, Stage
from mpo_megatron.runtime.commands import ROOT

SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$SBATCH_LOG"
number=$(wc -l < "$SBATCH_LOG")
if [[ "$*" == *"$SBATCH_REFUSES"* ]]; then
    echo "sbatch: error: invalid partition" >&2
    exit 1
fi
echo "$((100 + number));cluster"
"""
COMMAND = ["/some where/run_rounds.py", "rounds.yaml", "--output", "out", "a=[1, 2]"]


def stage(folder: Path, name: str, *needs: Stage) -> Stage:
    program = JOB if name.endswith("train") else Path("tool.py")
    made = folder / name / "made"
    return Stage(name, folder / name, (Command(program, ("a=1",), made, 2 * (program == JOB)),), {}, needs)


@pytest.fixture
def stages(tmp_path: Path) -> list[Stage]:
    sample = stage(tmp_path, "round-1/sample")
    score = stage(tmp_path, "round-1/score", sample)
    train = stage(tmp_path, "round-1/train", score, sample)
    return [sample, score, train, stage(tmp_path, "round-1/log-probs", train)]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sbatch's arguments are noted, a line a call."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "calls"))
    monkeypatch.setenv("SBATCH_REFUSES", "nothing")
    return tmp_path / "calls"


def test_the_chain(stages: list[Stage], sbatch: Path, tmp_path: Path) -> None:
    assert slurm.write_chain(stages, {}, tmp_path, COMMAND) == stages
    said = slurm.submit(tmp_path)
    assert said == "round-1/sample 101\nround-1/score 102\nround-1/train 103\nround-1/log-probs 104\n"
    folder = tmp_path / "slurm"
    after = "--kill-on-invalid-dep=yes"
    assert sbatch.read_text().splitlines() == [
        f"--parsable {folder}/01-round-1-sample.sh",
        f"--parsable --dependency=afterok:101 {after} {folder}/02-round-1-score.sh",
        f"--parsable --dependency=afterok:102:101 {after} {folder}/03-round-1-train.sh",
        f"--parsable --dependency=afterok:103 {after} {folder}/04-round-1-log-probs.sh",
    ]


def test_what_is_done_is_left_out(stages: list[Stage], sbatch: Path, tmp_path: Path) -> None:
    slurm.write_chain(stages, {}, tmp_path, COMMAND)
    for one in stages[:2]:
        one.folder.mkdir(parents=True)
        one.outputs[0].write_text("")
        state.begin(one)
        state.finish(one, 1.0)
    assert slurm.write_chain(stages, {}, tmp_path, COMMAND) == stages[2:]
    assert sorted(path.name for path in (tmp_path / "slurm").iterdir()) == [
        "01-round-1-train.sh", "02-round-1-log-probs.sh", "submit.sh",
    ]  # fmt: skip
    slurm.submit(tmp_path)
    assert "--dependency" not in sbatch.read_text().splitlines()[0]


def test_a_script_has_its_options_and_runs_its_stage(
    stages: list[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "setup": ["echo set up", "export FROM_SETUP=1"],
        "common": {"time": "08:00:00", "exclusive": True, "partition": "a"},
        "train": {"nodes": 2, "partition": "b", "exclusive": False},
    }
    program = tmp_path / "run_rounds.py"
    program.write_text("import os, sys; print(os.getcwd(), os.environ['FROM_SETUP'], sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    slurm.write_chain(stages, options, tmp_path / "a b", [str(program), *COMMAND[1:]])
    folder = tmp_path / "a b" / "slurm"
    sample, train = (
        (folder / f"{name}.sh").read_text() for name in ("01-round-1-sample", "03-round-1-train")
    )
    directives = [
        line.removeprefix("#SBATCH --") for line in sample.splitlines() if line.startswith("#SBATCH")
    ]
    assert directives == [
        "job-name=a-b-round-1-sample", f"output={folder}/%x-%j.log", "time=08:00:00", "exclusive", "partition=a",
    ]  # fmt: skip
    for line in ("nodes=2", "partition=b", "signal=B:USR1@120", "requeue"):
        assert f"#SBATCH --{line}\n" in train
    assert "exclusive" not in train
    for name, more in (("01-round-1-sample", ""), ("03-round-1-train", ", '--launcher', 'slurm'")):
        printed = subprocess.run(
            ["bash", str(folder / f"{name}.sh")], capture_output=True, text=True, check=True
        )
        stage_name = name[3:].replace("round-1-", "round-1/")
        assert printed.stdout.splitlines() == [
            "set up",
            f"{tmp_path} 1 ['rounds.yaml', '--output', 'out', 'a=[1, 2]', '--stage', '{stage_name}'{more}]",
        ]


def test_a_training_goes_over_the_nodes_of_its_job(stages: list[Stage]) -> None:
    train = stages[2]
    arguments, variables = command_line(train, train.commands[0], "slurm")
    assert arguments == ["bash", str(ROOT / "examples" / "slurm.sh"), "a=1"]
    assert variables["MPO_RANKS"] == "2"
    assert variables["MPO_OUTPUT"] == str(train.folder / "experiment")
    arguments, variables = command_line(train, train.commands[0], "local")
    assert arguments[-2:] == [str(JOB), "a=1"]
    assert variables == {}
    assert command_line(stages[0], stages[0].commands[0], "slurm")[0][1:] == ["tool.py", "a=1"]


def test_what_sbatch_refuses_is_one_sentence(
    stages: list[Stage], sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.write_chain(stages, {}, tmp_path, COMMAND)
    monkeypatch.setenv("SBATCH_REFUSES", "03-")
    with pytest.raises(
        UserError, match=r"sbatch refused a stage: .*invalid partition \(submitted before it: 101, 102\)$"
    ):
        slurm.submit(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no sbatch on this machine; run `bash .*submit\.sh` where"):
        slurm.submit(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trian": {}}, "slurm.trian is none of setup, common, sample"),
        ({"setup": "module load cuda"}, "slurm.setup must be a list of lines of shell, not module load cuda"),
        ({"train": ["nodes=2"]}, "slurm.train must be a mapping of sbatch's options such as"),
        ({"common": {"time": 86400}}, 'slurm.common.time=86400 must be a text: write it as "HH:MM:SS"'),
    ],
)
def test_wrong_options_are_one_sentence(
    options: dict, message: str, stages: list[Stage], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        slurm.write_chain(stages, options, tmp_path, COMMAND)
    assert message in str(raised.value)


def test_a_folder_that_cannot_be_written_is_one_sentence(stages: list[Stage], tmp_path: Path) -> None:
    (tmp_path / "slurm").write_text("")
    with pytest.raises(UserError, match="slurm cannot be written"):
        slurm.write_chain([replace(one, folder=tmp_path / "x") for one in stages], {}, tmp_path, COMMAND)
