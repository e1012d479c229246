"""metrics.jsonl: what a killed or refused write leaves of it."""

import json
import os
import signal
from pathlib import Path

import pytest
from nemo.utils import exp_manager

from mpo_megatron.config import Config
from mpo_megatron.errors import CheckpointError
from mpo_megatron.training.experiment import Experiment, start_experiment
from mpo_megatron.training.metrics_file import MetricsFile


def line(step: int) -> dict[str, object]:
    return {"step": step, "split": "train", "loss": 0.1 * step}


@pytest.mark.parametrize("half", [b"", b'{"step": 3, "sp', b'{"step": 3}'])
def test_a_line_that_was_being_written_is_dropped(half: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (1, 2):
        first.append(line(step))
    first.close()
    path.write_bytes(path.read_bytes() + half)
    second = MetricsFile(path)
    assert second.read() == [line(1), line(2)]
    second.append(line(3))
    assert second.read() == [line(1), line(2), line(3)]
    second.close()


@pytest.mark.parametrize(
    "damage", [bytes(40), b"\xff\xfe", b"{}", b"[" * 5000, b'{"step": "1", "split": "train"}', b"3"]
)
def test_damaged_lines_are_dropped_and_said(
    damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(line(step)).encode() for step in (1, 2)]
    path.write_bytes(b"\n".join([whole[0], damage, whole[1], damage]) + b"\n")
    experiment = Experiment(tmp_path, [])
    assert experiment.history() == [line(1), line(2)]
    assert "metrics.jsonl had 2 damaged lines, which are dropped" in capsys.readouterr().out
    experiment.rewind(1)
    experiment.close()
    again = Experiment(tmp_path, [])
    assert again.history() == [line(1)]
    assert capsys.readouterr().out == ""
    again.close()


def test_rewound_and_written_again(tmp_path: Path) -> None:
    lines = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (0, 1, 2, 2, 3):
        lines.append(line(step))
    lines.rewind(1)
    lines.append(line(2))
    assert [one["step"] for one in lines.read()] == [0, 1, 2]
    lines.rewind(-1)
    assert lines.read() == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    lines.close()


def test_a_write_that_stops_in_the_middle_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = MetricsFile(tmp_path / "metrics.jsonl")
    lines.append(line(1))
    write, calls = os.write, []

    def full(file: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(file, data[:5])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl cannot be written \(No space left on device\); make room"
    ):
        lines.append(line(2))
    monkeypatch.undo()
    assert lines.read() == [line(1)]
    lines.append(line(2))
    assert lines.read() == [line(1), line(2)]
    lines.close()


def test_a_start_that_is_killed_in_exp_manager_leaves_the_lines_of_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves an earlier start's files away and then works on: the start is killed once it has."""
    lines = [line(step) for step in (1, 2, 3)]
    earlier = MetricsFile(tmp_path / "metrics.jsonl")
    for each in lines:
        earlier.append(each)
    earlier.close()
    (tmp_path / "cmd-args.log").touch()
    section = {
        "explicit_log_dir": str(tmp_path),
        "resume_if_exists": True,
        "create_tensorboard_logger": False,
    }
    for kills in range(2):
        pid = os.fork()
        if not pid:
            monkeypatch.setattr(exp_manager, "get_git_hash", lambda: os.kill(os.getpid(), signal.SIGKILL))
            start_experiment(Config(exp_manager=section))
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert (tmp_path / f"run_{kills}" / "cmd-args.log").is_file()
    experiment = start_experiment(Config(exp_manager=section))
    assert experiment.history() == lines
    experiment.log(4, "train", {"loss": 0.5})
    experiment.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert not list(tmp_path.rglob(".start"))
