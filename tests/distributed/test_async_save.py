"""Checkpoints that are written while the run goes on: a name when complete, and what is killed costs only itself."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mpo_megatron.errors import CheckpointError, UserError
from mpo_megatron.runtime.commands import ROOT
from tests.distributed.jobs import Layout, Model, build, gradients, logps
from tests.distributed.test_checkpoint import FORMS, SIZES, train
from tests.helpers.main_job import arguments, exact, job, metrics
from tests.helpers.models import make_llama

DISTRIBUTED = Layout(distributed_optimizer=True)
_armed = False


def _stop_once() -> None:
    """In a forked process: stop it before it does anything, if asked to."""
    global _armed
    if _armed:
        _armed = False
        os.kill(os.getpid(), signal.SIGSTOP)


os.register_at_fork(after_in_child=_stop_once)


def start(writer: Any, model: Model, step: int, source: Path) -> int:
    """Begin to write a checkpoint by a process that has stopped before it could do anything. Returns its number."""
    global _armed
    _armed = True
    writer.start(step, model.chunks, model.optimizer, model.schedule, {}, source)
    _armed = False
    process: int = writer._queue.async_calls[0].async_caller.process.pid
    _, status = os.waitpid(process, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return process


def step(model: Model, reference: torch.Tensor) -> None:
    gradients(model, reference, "wmpo")
    model.optimizer.step()
    model.schedule.step(1)


def names(folder: Path) -> set[str]:
    """Of the files there, with one name for all that is temporary."""
    return {path.name if path.name[0] != "." else path.name.partition("-")[0] for path in folder.iterdir()}


def train_while_writing(folder: Path, wanted: Layout, save: Path, form: str) -> torch.Tensor:
    """Two steps, a checkpoint of them that is not written before two more are done. Returns the log-probs then."""
    from mpo_megatron.training.checkpoint_writer import CheckpointWriter

    model = build(folder, SIZES, wanted)
    reference = logps(model)
    writer = CheckpointWriter(save, model.layout, form, asynchronous=True)
    assert writer.finish() is None
    for _ in range(2):
        step(model, reference)
    process = start(writer, model, 2, folder)
    for _ in range(2):
        step(model, reference)
        assert writer.finish(wait=False) is None
        assert names(save) == {".step_0000002"}
    os.kill(process, signal.SIGCONT)
    assert writer.finish() == save / "step_0000002"
    assert names(save) == {"step_0000002"}
    writer.close()
    assert not psutil.Process().children()  # such as Megatron's server for what writers tell
    return logps(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, DISTRIBUTED),
        (2, Layout(distributed_optimizer=True, precision=torch.bfloat16)),
        (2, Layout(precision=torch.bfloat16)),
        (2, Layout(distributed_optimizer=True, overlap=True, precision=torch.bfloat16)),
        (4, Layout(tp=2, distributed_optimizer=True)),
    ],
    ids=["dp2", "dp2 in bf16", "plain in bf16", "overlap in bf16", "tp2-dp2"],
)
def test_it_is_of_the_step_at_which_it_was_begun(
    world: int, layout: Layout, form: str, folder: Path, ranks: Any, tmp_path: Path
) -> None:
    """The run that goes on from it, while the weights have changed, is the run that went on, to the last bit."""
    expected, *_ = ranks(world).run(train_while_writing, folder, layout, tmp_path, form)
    ((resumed, _), *_) = ranks(world).run(train, folder, layout, 2, tmp_path, None)
    assert torch.equal(resumed, expected)


def kill_one_writer(folder: Path, save: Path) -> str:
    """A checkpoint, another whose writing ends on rank 1, and a third. Returns the second's error."""
    from mpo_megatron.training.checkpoint_writer import CheckpointWriter

    model = build(folder, SIZES, DISTRIBUTED)
    reference, error = logps(model), ""
    writer = CheckpointWriter(save, model.layout, asynchronous=True)
    for number in (1, 2, 3):
        step(model, reference)
        process = start(writer, model, number, folder)
        ends = number == 2 and model.layout.rank == 1
        os.kill(process, signal.SIGKILL if ends else signal.SIGCONT)
        try:
            writer.finish()
        except CheckpointError as caught:
            error = str(caught)
            assert names(save) == {"step_0000001", ".step_0000002"}
    writer.close()
    return error


def test_a_part_that_was_not_written_stops_all_ranks_and_the_next_is_whole(
    folder: Path, ranks: Any, tmp_path: Path
) -> None:
    first, second = ranks(2).run(kill_one_writer, folder, tmp_path)
    assert first == second
    assert first.startswith(f"{tmp_path / 'step_0000002'} cannot be written (")
    assert "the checkpoints before it are whole" in first
    assert names(tmp_path) == {"step_0000001", ".step_0000002", "step_0000003"}
    expected, *_ = ranks(2).run(train, folder, DISTRIBUTED, 3, None, None)
    found, *_ = ranks(2).run(train, folder, DISTRIBUTED, 0, tmp_path, None)
    assert torch.equal(found[0], expected[0])


def lose_the_end_of_a_file(folder: Path, save: Path) -> str:
    """A checkpoint of which the storage has lost a byte when it is complete. Returns the error."""
    from mpo_megatron.training.checkpoint_writer import CheckpointWriter

    model = build(folder, SIZES, DISTRIBUTED)
    writer = CheckpointWriter(save, model.layout, asynchronous=True)
    process = start(writer, model, 1, folder)
    os.kill(process, signal.SIGCONT)
    writer._queue.async_calls[0].async_caller.process.join()
    if model.layout.rank == 1:
        (path,) = save.glob(".step_0000001-*/__1_0.distcp")
        os.truncate(path, path.stat().st_size - 1)
    try:
        writer.finish()
    except CheckpointError as caught:
        return str(caught)
    finally:
        writer.close()
    return ""


def test_a_checkpoint_that_is_not_whole_gets_no_name(folder: Path, ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2).run(lose_the_end_of_a_file, folder, tmp_path)
    assert first == second
    assert first.startswith(
        f"{tmp_path / 'step_0000001'} is not whole though it was written without an error ("
    )
    assert "__1_0.distcp is cut off" in first
    assert names(tmp_path) == {".step_0000001"}


def job_that_dies(overrides: list[str], at: int) -> None:
    """Run the job, and kill it while the checkpoint of a step is being written."""
    from mpo_megatron.training.checkpoint_writer import CheckpointWriter

    begin = CheckpointWriter.start

    def begin_and_die(self: Any, step: int, *arguments: Any) -> None:
        global _armed
        _armed = step == at
        begin(self, step, *arguments)
        if step == at:
            os.waitpid(self._queue.async_calls[0].async_caller.process.pid, os.WUNTRACED)
            os.kill(os.getpid(), signal.SIGKILL)

    CheckpointWriter.start = begin_and_die  # type: ignore[assignment,method-assign]
    job(overrides)


@pytest.fixture
def own_session() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended at the end with all that they have started."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    inputs: dict[str, Path], ranks: Any, own_session: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    more = ["trainer.max_steps=6", "trainer.save_interval=2", "trainer.checkpoint.async_save=true",
            "exp_manager.resume_if_exists=true"]  # fmt: skip
    straight, killed = (arguments(inputs, tmp_path / name, *more) for name in ("straight", "killed"))
    assert ranks(1).run(job, straight, timeout=240) == [""]
    command = f"from tests.distributed.test_async_save import job_that_dies; job_that_dies({killed!r}, 4)"
    root = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", command], env=environment, cwd=root, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    own_session.append(process)
    assert process.wait(timeout=240) == -signal.SIGKILL
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert names(checkpoints) == {"step_0000002", ".step_0000004"}
    assert ranks(1).run(job, killed, timeout=240) == [""]
    assert names(checkpoints) == names(tmp_path / "straight" / "checkpoints")
    assert names(checkpoints) == {f"step_000000{number}" for number in (2, 4, 6)}
    for split in ("train", "validation"):
        ours, theirs = exact(tmp_path / "killed", split), exact(tmp_path / "straight", split)
        assert len(ours) >= 2
        assert ours == theirs


def job_with_error_at(overrides: list[str], number: int) -> str:
    """Run the job, and stop it by a user's error at a step."""
    from mpo_megatron.training import trainer

    ordinary = trainer.train_step

    def erring(current: Any, step: int, *more: Any) -> dict[str, float]:
        if step == number:
            raise UserError("enough")
        return ordinary(current, step, *more)

    trainer.train_step = erring  # type: ignore[assignment]
    try:
        return job(overrides)
    finally:
        trainer.train_step = ordinary


def test_an_error_waits_for_the_checkpoint_under_way(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    more = ["trainer.save_interval=2", "trainer.checkpoint.async_save=true", "model.export_at_save=true"]
    overrides = arguments(inputs, tmp_path, *more)
    assert ranks(2).run(job_with_error_at, overrides, 3, timeout=240) == ["enough", "enough"]
    assert names(tmp_path / "checkpoints") == {"step_0000002"}
    assert metrics(tmp_path)[-1]["step"] == 2
