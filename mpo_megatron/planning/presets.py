"""Which layout a preset takes, and what it then costs.

Of the layouts that the search finds, the simplest among the fastest. Times are of typical lengths. Memory is the most
that these and each extreme take: lengths change the size of a row, and how many responses read its prompts' keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.hardware import Machine
from mpo_megatron.planning.memory import RESERVED, largest_stage
from mpo_megatron.planning.performance import StepTime, step_time
from mpo_megatron.planning.profile import plan_rows
from mpo_megatron.planning.run import Run
from mpo_megatron.planning.search import search
from mpo_megatron.scheduling.layout import GroupLengths

# Of the memory that a layout may take, what a chosen one leaves free: the planner's activations are within 6%.
SPARE = 0.05
# Groups/s that a simpler layout may be behind the best. Times of the planner are no better than that.
WORTH_IT = 0.03


@dataclass(frozen=True)
class Target:
    """GPUs and the precision that they compute in; `multiple_of` is as in `search`."""

    machine: Machine
    fp8: bool
    multiple_of: Callable[[int], int]

    @property
    def capacity(self) -> float:
        """Bytes that a layout may take of a GPU."""
        return self.machine.gpu.memory - RESERVED


@dataclass(frozen=True)
class Lengths:
    """Lengths of a global batch: what is usual, and what takes most memory."""

    typical: Sequence[GroupLengths]
    extremes: Sequence[Sequence[GroupLengths]]


@dataclass(frozen=True)
class Cost:
    """Bytes on a GPU of the largest stage, at the most and of typical lengths, and the time of a typical step."""

    memory: int
    typical_memory: int
    time: StepTime


def cost_of(a: Architecture, run: Run, target: Target, lengths: Lengths, efficiency: float) -> Cost:
    """What the planner says of a run. `efficiency` is as in `performance.step_time`."""
    shape = plan_rows(lengths.typical, run, a.cost_model)
    typical = largest_stage(a, run, shape).total
    time = step_time(a, run, shape, target.machine, efficiency)
    return Cost(max(typical, _extreme_memory(a, run, lengths)), typical, time)


def choose(a: Architecture, base: Run, target: Target, lengths: Lengths, efficiency: float) -> Run:
    """The layout of a preset.

    Of those within WORTH_IT of the fastest it takes the one that cuts the model in the fewest ways; of these, the one
    that takes least memory.

    Raises:
        ConfigError: none fits.
    """
    allowed = target.capacity * (1 - SPARE)
    fast: list[tuple[int, int, Run]] = []
    best = 0.0
    found = search(a, base, lengths.typical, target.machine, efficiency, target.multiple_of)
    for one in found.candidates:
        if one.time.groups_per_second < best * (1 - WORTH_IT):
            break
        memory = max(one.memory.total, _extreme_memory(a, one.run, lengths))
        if memory <= allowed:
            best = best or one.time.groups_per_second
            fast.append((_cuts(one.run), memory, one.run))
    if not fast:
        machine = target.machine
        raise ConfigError(f"no layout fits {machine.gpus} x {machine.gpu.name}; take more of them")
    return min(fast, key=lambda item: item[:2])[2]


def _extreme_memory(a: Architecture, run: Run, lengths: Lengths) -> int:
    """Bytes on a GPU of the stage that takes most, of the extreme that takes most."""
    shapes = [plan_rows(groups, run, a.cost_model) for groups in lengths.extremes]
    return max(largest_stage(a, run, shape).total for shape in shapes)


def _cuts(run: Run) -> int:
    sizes = (run.tp, run.pp, run.vpp, run.cp)
    return sum(size > 1 for size in sizes) + (run.recompute.granularity is not None)
