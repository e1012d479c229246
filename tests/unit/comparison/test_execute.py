"""Runs as sub-processes, by torchrun as ever, of small scripts in the main job's place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpo_megatron.comparison import execute
from mpo_megatron.comparison.plan import Run
from mpo_megatron.errors import UserError
from mpo_megatron.runtime.commands import ROOT

JOB = """
import json, os, pathlib, sys
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
assert given["exp_manager.resume_if_exists"] == "true"
folder = pathlib.Path(given["exp_manager.explicit_log_dir"].strip('"'))
folder.mkdir(parents=True, exist_ok=True)
if os.environ["RANK"] == "0":
    with (folder / "starts").open("a") as file:
        file.write(given["model.data.cache_dir"] + "\\n")
if given["name"] == "bad":
    sys.exit("error: model.mpo.beta=-1 must be above 0")
(folder / "validation").mkdir(exist_ok=True)
for step, logps in enumerate([[-3.0, -4.0], [-2.5, -4.5]]):
    line = {"id": "a", "logps": logps, "rewards": logps, "tokens": [2, 2], "scores": [1, 0], "preferred": [True, False]}
    (folder / "validation" / f"step_{step:07d}.jsonl").write_text(json.dumps(line) + "\\n")
values = {"reward_margin": 0.0, "accuracy": 0.5, "loss": 1.0}
lines = [{"step": 0, "split": "validation", **values}, {"step": 1, "split": "train", "seconds": 0.5},
         {"step": 1, "split": "validation", **values, "reward_margin": float(os.environ["WORLD_SIZE"])}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    monkeypatch.setattr(execute, "JOB", path)
    return path


def run_of(folder: Path, *overrides: str) -> Run:
    return Run("a", 1, overrides, folder / "a b" / "seed-1", dict(o.split("=") for o in overrides))


def test_a_run_that_has_finished_is_kept(job: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, "name=good")
    assert execute.finished(run, 2) is None
    result = execute.execute(run, 2, tmp_path / "cache")
    assert (result["reward_margin_after"], result["log_ratio_margin"], result["divergence"]) == (
        2.0,
        1.0,
        0.0,
    )
    assert execute.finished(run, 2) == result
    assert {path.name for path in run.folder.iterdir()} == {"run.json", "job.log", "experiment"}
    assert (run.folder / "experiment" / "starts").read_text() == f"{tmp_path / 'cache'}\n"


def test_a_run_that_failed_is_started_again_with_other_settings(job: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.mpo\.beta=-1 must be above 0$"):
        execute.execute(run_of(tmp_path, "name=bad"), 1, tmp_path / "cache")
    assert "error: model.mpo.beta=-1" in (run_of(tmp_path).folder / "job.log").read_text()
    assert execute.finished(run_of(tmp_path, "name=bad"), 1) is None
    assert execute.finished(run_of(tmp_path, "name=good"), 1) is None
    # Unless work would be lost, or mixed with that of other settings.
    (run_of(tmp_path).folder / "experiment" / "checkpoints" / "step_0000001").mkdir(parents=True)
    assert execute.finished(run_of(tmp_path, "name=bad"), 1) is None
    with pytest.raises(UserError, match="was run with name=bad, and now it is name=good: remove that folder"):
        execute.finished(run_of(tmp_path, "name=good"), 1)


def test_a_finished_run_is_not_taken_for_another(tmp_path: Path) -> None:
    run = run_of(tmp_path, "model.mpo.beta=0.1", "name=x", "name=y")
    run.folder.mkdir(parents=True)
    record = {"settings": execute.settings(run, 1), "result": {"steps": 3}}
    (run.folder / "run.json").write_text(json.dumps(record))
    assert execute.finished(run, 1) == {"steps": 3}
    assert execute.finished(run_of(tmp_path, "name=y", "model.mpo.beta=0.1"), 1) == {"steps": 3}
    for other, ranks, message in (
        (run, 2, "was run with ranks=1, and now it is ranks=2:"),
        (run_of(tmp_path, "model.mpo.beta=2", "name=y"), 1, "with model.mpo.beta=0.1, and now it is model.mpo.beta=2:"),
        (run_of(tmp_path, "model.mpo.beta=0.1"), 1, "was run with name=y, and now it is no name:"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            execute.finished(other, ranks)
    for broken in ("", "[]", "{}", '{"settings": 3, "result": null}'):
        (run.folder / "run.json").write_text(broken)
        with pytest.raises(UserError, match="is not what a comparison writes; remove"):
            execute.finished(run, 1)


def test_an_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    """Of torchrun and its two ranks none is left, and the interrupt goes on."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"(pathlib.Path({str(tmp_path)!r}) / ('pid' + os.environ['RANK'])).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    tool = (
        "import pathlib, signal, sys\n"
        # A shell that runs the tests in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mpo_megatron.comparison import execute\n"
        "from mpo_megatron.comparison.plan import Run\n"
        f"execute.JOB = pathlib.Path({str(script)!r})\n"
        f"execute.execute(Run('a', 1, (), pathlib.Path({str(tmp_path / 'run')!r})), 2, pathlib.Path('cache'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", tool], env=environment, stderr=subprocess.PIPE, text=True
    )
    pids = [tmp_path / "pid0", tmp_path / "pid1"]
    while not all(path.is_file() and path.read_text() for path in pids):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["result"] is None
