"""Faults of every other kind, for real: each costs some steps at most, is said in one sentence, and damages nothing."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mpo_megatron.config import FaultConfig
from mpo_megatron.training.checkpoint import folder_of
from tests.faults.forks import Forks, Job
from tests.faults.jobs import (
    LIMIT,
    assert_same_bits,
    check_whole,
    command,
    finish,
    last_step,
    newest,
    parameters,
    wait_until,
)
from tests.helpers.agents import ENVIRONMENT, free_port, job, torchrun
from tests.helpers.main_job import exact, metrics
from tests.unit.data.test_faults import LINES

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 12


def arguments(inputs: dict[str, Path], folder: Path, *more: str) -> list[str]:
    return command(inputs, folder, f"trainer.max_steps={STEPS}", *more)


def tell(fault: str, lost: int) -> None:
    """A line for the log: what was survived."""
    print(f"\n{fault}: survived, {lost} steps lost, nothing corrupted")


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Path], started: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(started.start(2, arguments(inputs, folder)))
    return folder


@pytest.fixture
def copied(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the unbroken run, to be damaged."""
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


def errors(job: Job) -> list[str]:
    """The sentences of all ranks."""
    outputs = map(job.output, range(len(job.ranks)))
    return [line for output in outputs for line in output.splitlines() if line.startswith("error: ")]


def test_sigterm_ends_the_run_after_its_step_with_its_state_saved(
    inputs: dict[str, Path], unbroken: Path, started: Forks, tmp_path: Path
) -> None:
    """The signal reaches one rank alone, and both save the same step, which is not one of the interval."""
    folder = tmp_path / "run"
    killed = arguments(inputs, folder, "trainer.save_interval=1000")
    run = started.start(2, killed, "tests.faults.test_faults:terminated_in_step_5")
    finish(run)
    expected = (
        f"SIGTERM has ended the run after step 5 of {STEPS}; its state is in {folder_of(folder / 'checkpoints', 5)}, "
        "and the same command goes on there"
    )
    assert expected in run.output().splitlines()
    assert (last_step(folder), newest(folder)) == (5, 5)
    assert not (folder / "hf").exists()
    finish(started.start(2, killed))
    assert_same_bits(folder, unbroken)
    assert exact(folder) == exact(unbroken)
    tell("SIGTERM", 0)


def terminated_in_step_5() -> None:
    """Send rank 1 the signal while it trains on step 5."""
    from mpo_megatron.training import trainer

    train_step = trainer.train_step

    def terminated(current: Any, step: int, *more: Any) -> dict[str, float]:
        if step == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(current, step, *more)

    trainer.train_step = terminated  # type: ignore[assignment]


def flip(path: Path, at: float = 0.5) -> None:
    """Change a byte in a file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("kind", ["tensors", "other files"])
def test_damaged_checkpoints_are_passed_over_and_said(
    kind: str, inputs: dict[str, Path], unbroken: Path, started: Forks, copied: Path
) -> None:
    """The three newest are damaged in three ways; the run goes on from the fourth, to the same bits."""
    last, second, third = (copied / "checkpoints" / f"step_{step:07d}" for step in (12, 9, 6))
    if kind == "tensors":
        flip(shards(last)[-1])
        cut(shards(second)[-1])
        shards(third)[0].unlink()
        reasons = ["is not as it was written, at ", "is cut off: ", "is missing, though .metadata names it"]
    else:
        flip(last / ".metadata", 0.9)
        cut(second / "optimizer_buckets.json")
        (third / "run.json").unlink()
        reasons = ["/.metadata is not as it was written", "optimizer_buckets.json is not as it was written",
                   "run.json cannot be read (No such file"]  # fmt: skip
    run = started.start(2, arguments(inputs, copied))
    finish(run)
    lines = run.output().splitlines()
    for path, reason in zip((last, second, third), reasons, strict=True):
        (said,) = [line for line in lines if f"{path}" in line and "is damaged" in line]
        assert reason.replace("[Errno 2] ", "") in said.replace("[Errno 2] ", "")
        assert said.endswith(f"the checkpoint is damaged and now called damaged_{path.name}")
    assert any(line.startswith("resumed at step 3 from ") for line in lines)
    assert_same_bits(copied, unbroken)
    assert exact(copied) == exact(unbroken)
    assert check_whole(copied) == STEPS
    assert len(list((copied / "checkpoints").glob("damaged_*"))) == 3
    tell(f"three damaged checkpoints, {kind}", 9)


def test_a_run_without_a_whole_checkpoint_ends_in_one_sentence(
    inputs: dict[str, Path], started: Forks, copied: Path
) -> None:
    for checkpoint in (copied / "checkpoints").iterdir():
        flip(shards(checkpoint)[-1])
    before = sorted((copied / "checkpoints").iterdir())
    run = started.start(2, arguments(inputs, copied))
    assert run.wait(LIMIT)
    assert run.ends == {0: 1, 1: 1}
    (error,) = errors(run) or [run.output(0)]
    assert f"none of the 4 checkpoints in {copied / 'checkpoints'} is whole (of the newest: " in error
    assert sorted((copied / "checkpoints").iterdir()) == before
    assert "Traceback" not in run.output(0) + run.output(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"this machine lets nobody mount a file system ({made.stderr.decode().strip()})")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_file_system_is_found_before_anything_is_written(
    inputs: dict[str, Path], unbroken: Path, started: Forks, small_disk: Path
) -> None:
    checkpoint = used(folder_of(unbroken / "checkpoints", 3))
    resize(small_disk, int(1.8 * checkpoint))
    folder = small_disk / "run"
    run = started.start(2, arguments(inputs, folder))
    assert run.wait(LIMIT), run.output()
    assert run.ends == {0: 1, 1: 1}, run.output()
    (error,) = errors(run)
    path = folder_of(folder / "checkpoints", 6)
    assert re.fullmatch(
        rf"error: {path} needs \S+ GB and {path.parent} has \S+ GB free; make room or give .*", error
    )
    assert "Traceback" not in run.output(0) + run.output(1)
    assert [found.name for found in (folder / "checkpoints").iterdir()] == ["step_0000003"]
    assert check_whole(folder) == 3
    lost = last_step(folder) - 3
    resize(small_disk, 20 * checkpoint)
    finish(started.start(2, arguments(inputs, folder)))
    assert_same_bits(folder, unbroken)
    assert exact(folder) == exact(unbroken)
    tell("a full file system", lost)


def test_a_file_system_that_fills_up_meanwhile_leaves_the_checkpoint_before(
    inputs: dict[str, Path], unbroken: Path, started: Forks, small_disk: Path
) -> None:
    """There is room when the checkpoint is begun; something else takes it before it is written."""
    checkpoint = used(folder_of(unbroken / "checkpoints", 3))
    resize(small_disk, 8 * checkpoint)
    folder = small_disk / "run"
    run = started.start(
        2, arguments(inputs, folder), "tests.faults.test_faults:disk_filled_at_the_second_save"
    )
    assert run.wait(LIMIT), run.output()
    assert run.ends == {0: 1, 1: 1}, run.output()
    (error,) = errors(run)
    assert "step_0000006 cannot be written (" in error
    assert "Traceback" not in run.output(0) + run.output(1)
    assert check_whole(folder) == 3
    (small_disk / "filler").unlink()
    finish(started.start(2, arguments(inputs, folder)))
    assert_same_bits(folder, unbroken)
    tell("a file system that fills up in a save", 3)


def disk_filled_at_the_second_save() -> None:
    from mpo_megatron.training.checkpoint_writer import CheckpointWriter

    make = CheckpointWriter._new_folder

    def filled(self: CheckpointWriter, final: Path) -> Path:
        made = make(self, final)
        if final.name == "step_0000006" and os.environ["RANK"] == "0":
            with (final.parents[2] / "filler").open("wb") as file:
                size = shutil.disk_usage(final.parent).free - 20_000
                os.posix_fallocate(file.fileno(), 0, size)
        torch.distributed.barrier()
        return made

    CheckpointWriter._new_folder = filled  # type: ignore[method-assign]


def test_a_file_system_without_room_for_a_line_of_metrics_costs_the_steps_since_the_checkpoint(
    inputs: dict[str, Path], unbroken: Path, started: Forks, small_disk: Path
) -> None:
    """The line that fits in part is taken back, and the run goes on when there is room."""
    resize(small_disk, 8 * used(folder_of(unbroken / "checkpoints", 3)))
    folder = small_disk / "run"
    run = started.start(2, arguments(inputs, folder), "tests.faults.test_faults:disk_filled_at_step_5")
    run.end(by_itself=60)
    assert set(run.ends.values()) == {1}, run.output()
    error, *others = errors(run)
    assert (
        f"{folder / 'metrics.jsonl'} cannot be written (No space left on device); make room, then " in error
    )
    assert all(other.startswith("error: rank 0") for other in others)
    assert "Traceback" not in run.output(0) + run.output(1)
    assert last_step(folder) == 4
    assert check_whole(folder) == 3
    (small_disk / "filler").unlink()
    finish(started.start(2, arguments(inputs, folder)))
    assert_same_bits(folder, unbroken)
    assert exact(folder) == exact(unbroken)
    tell("no room for a line of metrics", 1)


def disk_filled_at_step_5() -> None:
    from mpo_megatron.training.metrics_file import MetricsFile

    append = MetricsFile.append

    def filled(self: MetricsFile, line: dict[str, Any]) -> None:
        if line["step"] == 5:
            file = os.open(self._path.parents[1] / "filler", os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while os.write(file, bytes(4096)):
                    pass
            os.close(file)
            line = {**line, "long": "x" * 8192}  # so that it does not fit into the file's last page
        append(self, line)

    MetricsFile.append = filled  # type: ignore[method-assign]


def test_two_jobs_share_a_cache_folder(inputs: dict[str, Path], started: Forks, tmp_path: Path) -> None:
    """Both find it empty, tokenise and compute the reference at once; then one is killed while it does, and another."""
    fresh = inputs | {"cache": tmp_path / "cache"}
    short = "trainer.max_steps=3"
    jobs = [started.start(1, command(fresh, tmp_path / name, short)) for name in ("one", "two")]
    for found in jobs:
        finish(found)
    assert_same_bits(tmp_path / "one", tmp_path / "two")
    again = inputs | {"cache": tmp_path / "other"}
    jobs = [started.start(1, command(again, tmp_path / name, short)) for name in ("three", "four")]
    wait_until(lambda: (tmp_path / "other" / "data").is_dir(), jobs[0])
    jobs[0].kill([0])
    finish(jobs[1])
    finish(started.start(1, command(again, tmp_path / "three", short)))
    assert_same_bits(tmp_path / "three", tmp_path / "one")
    assert_same_bits(tmp_path / "four", tmp_path / "one")
    tell("two jobs on one cache, one killed", 0)


def nan_on_rank_1_in_step_4() -> None:
    """Spoil one value of rank 1's gradient, before gradients are summed."""
    from mpo_megatron.model import provider

    finalize, steps = provider.finalize_model_grads, itertools.count(1)

    def spoilt(models: list[Any], *args: Any, **kwargs: Any) -> None:
        if next(steps) == 4 and os.environ["RANK"] == "1":
            list(models[-1].parameters())[-1].main_grad.view(-1)[-1] = math.nan
        finalize(models, *args, **kwargs)

    provider.finalize_model_grads = spoilt


def test_a_nan_in_one_ranks_gradient_costs_that_step(
    inputs: dict[str, Path], started: Forks, tmp_path: Path
) -> None:
    run = started.start(2, arguments(inputs, tmp_path), "tests.faults.test_faults:nan_on_rank_1_in_step_4")
    finish(run)
    (skipped,) = metrics(tmp_path, "skipped")
    assert skipped["step"] == 4
    assert [line["step"] for line in metrics(tmp_path)] == [step for step in range(1, STEPS + 1) if step != 4]
    assert all(values.isfinite().all() for values in parameters(tmp_path).values())
    tell("NaN in one rank's gradient", 1)


def test_an_export_that_was_killed_is_made_again(
    inputs: dict[str, Path], started: Forks, tmp_path: Path
) -> None:
    """A run at its end waits for its exports; it and they are killed once the first one has started."""

    def exporting() -> bool:
        for process in started.left():
            with contextlib.suppress(psutil.Error):
                if "mpo_megatron.conversion.convert" in process.cmdline():
                    return True
        return False

    both = command(inputs, tmp_path, "trainer.max_steps=6", "model.export_at_save=true")
    run = started.start(2, both)
    wait_until(exporting, run)
    for process in started.left():
        process.kill()
    assert run.wait(20)
    assert not (tmp_path / "exports" / "step_0000006").exists()
    # What one that had come further would have left.
    (tmp_path / "exports" / ".step_0000003-killed").mkdir(parents=True)
    finish(started.start(2, both))
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"step_0000003", "step_0000006"}
    assert check_whole(tmp_path) == 6
    tell("an export killed", 0)


def test_faulty_data_that_are_skipped_leave_the_run_on_the_others(
    inputs: dict[str, Path], unbroken: Path, started: Forks, tmp_path: Path
) -> None:
    """Each fault of the data, and a line of 100 MB, among whole groups: the run is that on whole groups alone."""
    # The model's chat template refuses nothing.
    faulty = {name: case for name, case in LINES.items() if case[0] != "template"}
    lines = [
        content.replace(b'"id": "x"', b'"id": "x%d"' % n) for n, (_, content, _) in enumerate(faulty.values())
    ]
    first, *others = inputs["train"].read_bytes().splitlines()
    train = tmp_path / "train.jsonl"
    huge = b'{"id": "huge", "prompt": "' + b"x" * 100_000_000 + b'"}'
    train.write_bytes(b"\n".join([first, *lines[:9], *others[:7], huge, *lines[9:], *others[7:], b""]))
    policy = [f"model.data.faults.{fault.name}=skip" for fault in fields(FaultConfig)]
    longest = ["model.data.max_prompt_length=64", "model.data.truncation=skip"]
    folder = tmp_path / "run"
    run = started.start(2, arguments(inputs | {"train": train}, folder, *policy, *longest))
    finish(run)
    noted = [json.loads(text)["fault"] for text in (folder / "skipped_train.jsonl").read_text().splitlines()]
    assert Counter(noted) == Counter([*(fault for fault, _, _ in faulty.values()), "unreadable"])
    assert_same_bits(folder, unbroken)
    tell(f"{len(noted)} records at fault, of {len(set(noted))} kinds", 0)


@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed_ends_the_others_by_name(
    killed: int, inputs: dict[str, Path], started: Forks, tmp_path: Path
) -> None:
    """Without a launcher that would end them: as on another node than that of the killed one."""
    more = ["trainer.max_steps=5000", "trainer.checkpoint.most_recent_k=3"]
    run = started.start(2, arguments(inputs, tmp_path, *more))
    wait_until(lambda: last_step(tmp_path) > 3, run)
    run.kill([killed])
    began = time.monotonic()
    assert run.wait(30), run.output(1 - killed)
    seconds = time.monotonic() - began
    assert run.ends == {killed: -signal.SIGKILL, 1 - killed: 1}
    (error,) = errors(run)
    assert f"rank {killed}" in error
    assert "has ended or hangs (" in error
    lost = last_step(tmp_path) - check_whole(tmp_path)
    assert lost <= 3
    print(f"\nthe others had ended after {seconds:.1f} s")
    tell(f"rank {killed} is killed", lost)


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_rank_that_hangs_ends_the_others_by_name(
    stopped: int, inputs: dict[str, Path], started: Forks, tmp_path: Path
) -> None:
    """Rank 0, here, keeps the store by which the others would hear of it."""
    more = [
        "trainer.max_steps=5000",
        "trainer.checkpoint.most_recent_k=3",
        "trainer.heartbeat_timeout_minutes=0.1",
    ]
    run = started.start(2, arguments(inputs, tmp_path, *more))
    wait_until(lambda: last_step(tmp_path) > 3, run)
    run.kill([stopped], signal.SIGSTOP)
    began = time.monotonic()
    other = 1 - stopped
    while other not in run.poll():
        assert time.monotonic() < began + 40, run.output(other)
        time.sleep(0.05)
    seconds = time.monotonic() - began
    assert run.ends[other] == 1
    (error,) = errors(run)
    assert f"rank {stopped}" in error
    assert "has given no sign of life for " in error
    run.kill([stopped])
    assert run.wait(20)
    psutil.wait_procs(started.left(), timeout=10)
    assert started.left() == []
    lost = last_step(tmp_path) - check_whole(tmp_path)
    assert lost <= 3
    print(f"\nthe others had ended after {seconds:.1f} s")
    tell(f"rank {stopped} hangs", lost)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """torchrun agents, which are ended at the end."""
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()


def start_agent(more: Sequence[str], program: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    start = torchrun(1, 0, 2, free_port())
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*start, *more, *program], stdout=stream, stderr=subprocess.STDOUT, cwd=log.parent,
            env={**os.environ, **ENVIRONMENT}, start_new_session=True,
        )  # fmt: skip


def ranks_of(agent: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The agent's ranks, without what these have started."""
    return psutil.Process(agent.pid).children()


def wait_for_step(folder: Path, step: int, agent: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + LIMIT
    while newest(folder) < step:
        assert agent.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.01)


def test_torchrun_starts_a_killed_run_again_and_ranks_end_with_torchrun(
    inputs: dict[str, Path], agents: list["subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    """One rank is killed: --max-restarts goes on from the last checkpoint. Then the agent is: its ranks end."""
    folder, log = tmp_path / "run", tmp_path / "agent.log"
    program = job(*command(inputs, folder, "trainer.max_steps=5000", "trainer.checkpoint.most_recent_k=3"))
    agent = start_agent(["--max-restarts", "1"], program, log)
    agents.append(agent)
    wait_for_step(folder, 3, agent, log)
    ranks_of(agent)[1].kill()
    killed_at = last_step(folder)
    end = time.monotonic() + LIMIT
    while "resumed at step " not in log.read_text():
        assert agent.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)
    (resumed,) = re.findall(r"resumed at step (\d+) from", log.read_text())
    assert int(resumed) >= 3
    wait_for_step(folder, int(resumed) + 3, agent, log)
    ranks = ranks_of(agent)
    everything = psutil.Process(agent.pid).children(recursive=True)
    agent.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    seconds = time.monotonic() - began
    assert not alive
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert not alive
    said = re.findall(
        r"error: torchrun \(process \d+\) has ended on .*, and so does its rank (\d);", log.read_text()
    )
    assert said, log.read_text()[-3000:]
    lost = last_step(folder) - check_whole(folder)
    assert lost <= 3
    print(
        f"\nall ranks had ended {seconds:.1f} s after torchrun; killed at step {killed_at}, resumed at {resumed}"
    )
    tell("torchrun restarts; torchrun killed", lost)
