"""kill -9 of one rank or of all, at any moment: the same command goes on, and nothing is lost but some steps.

The main job runs in real processes over Gloo and is killed again and again: at random moments after its start, while a
checkpoint is written, and while the model is exported. Each time the same command starts it again. At the end all
parameters and the optimizer's state are those of a run that nobody killed: to the last bit at the same layout, within
1e-5 where each start has another layout.

12 kills; a longer mode takes any number, at most 50 of one run and the others of further runs, and another seed:

    MPO_KILLS=30 python -m pytest -s tests/faults/test_kills.py
    MPO_KILLS=1000 MPO_KILLS_SEED=7 python -m pytest -s tests/faults/test_kills.py
"""

import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

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
from tests.helpers.main_job import exact

KILLS = int(os.environ.get("MPO_KILLS", "12"))
SEED = int(os.environ.get("MPO_KILLS_SEED", "0"))
# Of them over other layouts, whose resumes take longer: as many again would not fit the suite's time.
OTHER = max(1, KILLS * 2 // 5)
# Of one run: its steps, and so its time without a kill, grow with their number.
IN_A_RUN = 50
INTERVAL = 3
STEPS = 4 * min(KILLS, IN_A_RUN)
MOMENTS = {"any": "at any moment", "save": "in a save", "export": "in an export"}

# (ranks, keys of the layout)
Layout = tuple[int, list[str]]
ONE: Layout = (1, [])
DP2: Layout = (2, [])
TP2: Layout = (2, ["model.tensor_model_parallel_size=2"])
PP2: Layout = (2, ["model.pipeline_model_parallel_size=2"])

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300 + 20 * KILLS)]


def arguments(inputs: dict[str, Path], folder: Path, *more: str) -> list[str]:
    steps = [f"trainer.max_steps={STEPS}", f"trainer.save_interval={INTERVAL}"]
    return command(inputs, folder, *steps, "trainer.checkpoint.most_recent_k=3", *more)


@dataclass
class Tally:
    """What was tried and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)  # by what the job was doing
    starts: int = 0
    lost: list[int] = field(default_factory=list)  # steps that were done and are not in a checkpoint
    seconds: list[float] = field(default_factory=list)  # until the other ranks had ended

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.kills + other.kills,
            self.starts + other.starts,
            self.lost + other.lost,
            self.seconds + other.seconds,
        )

    def __str__(self) -> str:
        of = ", ".join(f"{count} {moment}" for moment, count in sorted(self.kills.items()))
        return (
            f"kill -9: {self.kills.total()} faults tried ({of}), all survived, nothing corrupted; "
            f"{self.starts} starts; steps lost: {max(self.lost)} at most of an interval of {INTERVAL}, "
            f"{sum(self.lost)} in all; the other ranks had ended after {max(self.seconds):.1f} s at most"
        )


def writing(folder: Path, moment: str) -> set[str]:
    """The unfinished folders of checkpoints ("save"), or of the model's export."""
    pattern = {"save": "checkpoints/.step_*", "export": ".hf-*"}.get(moment)
    return {path.name for path in folder.glob(pattern)} if pattern else set()


def wait_for_moment(
    moment: str, draw: random.Random, last: int, window: float, folder: Path, job: Job
) -> bool:
    """Wait until the job is to be killed: at any moment of so many seconds, in one of the next saves, or in the export.

    Args:
        last: the checkpoint after which it is killed, even if its moment has not come, so that there is something left
            to kill.

    Returns:
        Whether it has come to that before its end.
    """
    at, number = time.monotonic() + draw.uniform(0.0, window), draw.choice((1, 2))
    known = writing(folder, moment)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if len(job.poll()) == len(job.ranks):
            return False
        new = writing(folder, moment) - known
        known |= new
        number -= len(new)
        if (moment == "any" and time.monotonic() > at) or (moment != "export" and newest(folder) > last):
            return True
        if new and (moment == "export" or number <= 0):
            time.sleep(draw.uniform(0.0, 0.1 if moment == "save" else 0.02))
            return True
        time.sleep(0.002)
    raise AssertionError(job.output())


def run_killed(
    started: Forks,
    draw: random.Random,
    folder: Path,
    arguments: Sequence[str],
    layouts: Sequence[Layout],
    window: float,
    kills: int,
) -> Tally:
    """Start the job and kill it so many times, a sixth of them in the export, and let it then come to its end.

    Args:
        window: seconds from a start in which it is killed, where that is at any moment.
    """
    tally, done = Tally(), 0
    early = kills - kills // 6
    while done < kills:
        moment = draw.choice(("any", "save")) if done < early else "export"
        world, layout = draw.choice(layouts)
        job = started.start(world, [*arguments, *layout])
        tally.starts += 1
        last = STEPS * (done + 1) // (early + 1)
        if not wait_for_moment(moment, draw, last, window, folder, job):
            assert list(job.ends.values()) == [0] * world, "\n".join(map(job.output, range(world)))
            continue
        one = world > 1 and draw.random() < 0.5
        job.kill([draw.randrange(world)] if one else list(range(world)))
        began = time.monotonic()
        job.end()
        tally.seconds.append(time.monotonic() - began)
        tally.kills[f"{MOMENTS[moment]}, {'one rank' if one else 'all ranks'}"] += 1
        tally.lost.append(max(last_step(folder) - check_whole(folder), 0))
        assert tally.lost[-1] <= INTERVAL
        psutil.wait_procs(started.left(), timeout=10)
        assert started.left() == [], "a process was left behind"
        done += 1
    world, layout = draw.choice(layouts)
    finish(started.start(world, [*arguments, *layout]))
    assert not writing(folder, "save") | writing(folder, "export")
    return tally


def shares(kills: int) -> list[int]:
    """The kills of each run, as equal as can be and IN_A_RUN at most."""
    runs = -(-kills // IN_A_RUN)
    return [kills // runs + (number < kills % runs) for number in range(runs)]


@dataclass(frozen=True)
class Unbroken:
    """A run that nobody has killed, on two ranks.

    Attributes:
        window: seconds from a start to the end of a sixteenth of the training.
    """

    folder: Path
    window: float


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Path], started: Forks, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    began = time.monotonic()
    job = started.start(2, arguments(inputs, folder))
    wait_until(lambda: writing(folder, "save"), job)
    start = time.monotonic() - began
    finish(job)
    return Unbroken(folder, start + (time.monotonic() - began - start) / 16)


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    inputs: dict[str, Path], unbroken: Unbroken, started: Forks, tmp_path: Path
) -> None:
    draw, total = random.Random(SEED), Tally()
    for number, kills in enumerate(shares(KILLS)):
        folder = tmp_path / f"run{number}"
        total += run_killed(started, draw, folder, arguments(inputs, folder), [DP2], unbroken.window, kills)
        assert_same_bits(folder, unbroken.folder)
        assert exact(folder) == exact(unbroken.folder)
        print(f"\nthe same layout, run {number + 1}: in all {total}", flush=True)
    assert {moment.partition(",")[0] for moment in total.kills} == set(MOMENTS.values())


def test_a_run_killed_and_resumed_at_other_layouts_ends_with_the_same_parameters(
    inputs: dict[str, Path], unbroken: Unbroken, started: Forks, tmp_path: Path
) -> None:
    form = "trainer.checkpoint.dist_ckpt_optim_fully_reshardable=true"
    layouts = [ONE, DP2, TP2, PP2]
    theirs = parameters(unbroken.folder)
    norm = torch.cat([tensor.flatten() for tensor in theirs.values()]).norm()
    draw, total = random.Random(SEED + 1), Tally()
    for number, kills in enumerate(shares(OTHER)):
        folder = tmp_path / f"run{number}"
        total += run_killed(
            started, draw, folder, arguments(inputs, folder, form), layouts, unbroken.window, kills
        )
        ours = parameters(folder)
        assert ours.keys() == theirs.keys()
        difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
        relative = float(difference / norm)
        print(
            f"\nother layouts, run {number + 1}: in all {total}; parameters differ by {relative:.1e} relative",
            flush=True,
        )
        assert relative <= 1e-5
