"""Which checkpoints are kept, and how the others go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_megatron.config import MONITORS, CheckpointConfig
from mpo_megatron.conversion.convert import import_hf
from mpo_megatron.conversion.torch_dist import FORMAT_FILE
from mpo_megatron.objectives.metrics import METRICS
from mpo_megatron.training.checkpoint import all_checkpoints, latest_checkpoint, remove_leftovers
from mpo_megatron.training.exports import BackgroundExports, _Export
from mpo_megatron.training.retention import VALIDATION_FILE, remove_superfluous, superfluous
from tests.helpers.models import make_llama

NAN = float("nan")
LOSSES = {2: 0.7, 4: 0.5, 6: 0.6, 8: 0.9, 10: 0.8}


@pytest.mark.parametrize(
    ("rule", "values", "gone"),
    [
        (CheckpointConfig(), LOSSES, []),
        (CheckpointConfig(most_recent_k=1), LOSSES, [2, 4, 6, 8]),
        (CheckpointConfig(most_recent_k=3), LOSSES, [2, 4]),
        (CheckpointConfig(most_recent_k=9), LOSSES, []),
        (CheckpointConfig(save_top_k=1), LOSSES, [2, 6, 8]),
        (CheckpointConfig(save_top_k=2), LOSSES, [2, 8]),
        (CheckpointConfig(save_top_k=2, most_recent_k=2), LOSSES, [2]),
        (CheckpointConfig(save_top_k=1, mode="max"), LOSSES, [2, 4, 6]),
        (CheckpointConfig(save_top_k=1, monitor="accuracy"), LOSSES, [2, 4, 6]),
        (CheckpointConfig(save_top_k=1, monitor="accuracy", mode="min"), LOSSES, [2, 6, 8]),
        # Of equal ones the newer; without a value, or with NaN, the worst.
        (CheckpointConfig(save_top_k=1), {1: 0.5, 2: 0.5, 3: 0.6}, [1]),
        (CheckpointConfig(save_top_k=2), {1: NAN, 2: 0.5, 3: None, 4: 0.6, 5: 0.9}, [1, 3]),
        (CheckpointConfig(save_top_k=3), {1: NAN, 2: 0.5, 3: None, 4: None}, [1, 3]),
        (CheckpointConfig(save_top_k=1), {}, []),
    ],
)
def test_the_best_and_the_newest_are_kept(
    rule: CheckpointConfig, values: dict[int, float | None], gone: list[int]
) -> None:
    assert superfluous(values, rule) == gone
    assert superfluous(values, rule, needed=gone) == []


def test_every_monitor_is_a_metric() -> None:
    assert set(MONITORS) < set(METRICS)


def saved(folder: Path, values: dict[int, float | None]) -> None:
    for step, value in values.items():
        path = folder / f"step_{step:07d}"
        path.mkdir(parents=True)
        (path / FORMAT_FILE).write_text("{}")
        metrics = {} if value is None else {"loss": value}
        (path / VALIDATION_FILE).write_text(json.dumps(metrics))


def steps(folder: Path) -> list[int]:
    return list(all_checkpoints(folder))


def test_those_in_use_stay_until_they_are_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, {1: 0.5, 2: 0.9, 3: None, 4: 0.8, 5: 0.6})
    rule = CheckpointConfig(save_top_k=1)
    reading = tmp_path / "below" / ".." / "step_0000002"
    (tmp_path / "below").mkdir()
    remove_superfluous(all_checkpoints(tmp_path), rule, [reading])
    assert steps(tmp_path) == [1, 2, 5]
    remove_superfluous(all_checkpoints(tmp_path), rule, [])
    assert steps(tmp_path) == [1, 5]
    assert {path.name for path in tmp_path.iterdir()} == {"below", "step_0000001", "step_0000005"}
    assert capsys.readouterr().out.splitlines() == [
        f"removed     {tmp_path / f'step_000000{step}'}" for step in (3, 4, 2)
    ]


def test_one_that_another_process_reads_stays(tmp_path: Path) -> None:
    saved(tmp_path, {1: None, 2: None, 3: None})
    code = "import sys; from pathlib import Path; from mpo_megatron.runtime.publish import reading\n"
    code += "with reading(Path(sys.argv[1])): print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "step_0000001" / FORMAT_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        remove_superfluous(all_checkpoints(tmp_path), CheckpointConfig(most_recent_k=1), [])
        assert steps(tmp_path) == [1, 3]
        reader.communicate("\n")
    remove_superfluous(all_checkpoints(tmp_path), CheckpointConfig(most_recent_k=1), [])
    assert steps(tmp_path) == [3]


def test_what_an_export_reads_is_in_use(tmp_path: Path) -> None:
    import_hf(make_llama(tmp_path / "source"), tmp_path / "checkpoint")
    exports = BackgroundExports()
    exports.start(tmp_path / "checkpoint", tmp_path / "exported", None)
    sleeping = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    exports._running.append(_Export(tmp_path / "other", tmp_path / "none", sleeping))
    assert tmp_path / "other" in exports.reading()
    exports._running[0].process.wait()
    assert exports.reading() == [tmp_path / "other"]
    sleeping.communicate("\n")
    assert exports.reading() == []
    exports.wait()
    assert (tmp_path / "exported" / "config.json").is_file()


def test_what_was_begun_and_not_ended_is_cleared(tmp_path: Path) -> None:
    saved(tmp_path, {8: 0.5, 12: 0.4})
    for name in (".step_0000016-abc", ".step_0000004.removed"):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / "step_last").mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_0000008", "step_0000012", "step_last"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000012"
    remove_leftovers(tmp_path / "absent")
