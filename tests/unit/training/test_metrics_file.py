"""metrics.jsonl: what a killed or refused write leaves of it."""

import os
from pathlib import Path

import pytest

from mpo_megatron.errors import CheckpointError
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
