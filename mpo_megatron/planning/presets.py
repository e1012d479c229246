"""Which layout a preset takes, and what it then costs.

Of the layouts that the search finds, the simplest among the fastest. Times are of typical lengths. Memory is the most
that these and each extreme take: lengths change the size of a row, and how many responses read its prompts' keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.hardware import Machine
from mpo_megatron.planning.memory import RESERVED, stage_memory
from mpo_megatron.planning.performance import StepTime, step_time
from mpo_megatron.planning.profile import StepShape, plan_rows
from mpo_megatron.planning.run import Run, different_stages
from mpo_megatron.planning.search import search
from mpo_megatron.scheduling.layout import GroupLengths

# Of the memory that a layout may take, what a chosen one leaves free: the planner's activations are within 6%.
SPARE = 0.05
# Groups/s that a simpler layout may be behind the best. Times of the planner are no better than that.
WORTH_IT = 0.03
# Bytes of a weight's casts, which Transformer Engine keeps over the rows of a step: one as it is and one transposed.
# The plan of an FP8 run is of bf16 otherwise: too much by the embedding, and by what FP8 saves of activations.
FP8_COPIES = 2


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
    typical = _memory(a, run, target, shape)
    time = step_time(a, run, shape, target.machine, efficiency, target.fp8)
    return Cost(max(typical, _extreme_memory(a, run, target, lengths)), typical, time)


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
    found = search(a, base, lengths.typical, target.machine, efficiency, target.multiple_of, target.fp8)
    for one in found.candidates:
        if one.time.groups_per_second < best * (1 - WORTH_IT):
            break
        memory = max(_memory(a, one.run, target, one.shape), _extreme_memory(a, one.run, target, lengths))
        if memory <= allowed:
            best = best or one.time.groups_per_second
            fast.append((_cuts(one.run), memory, one.run))
    if not fast:
        machine = target.machine
        raise ConfigError(f"no layout fits {machine.gpus} x {machine.gpu.name}; take more of them")
    return min(fast, key=lambda item: item[:2])[2]


def _memory(a: Architecture, run: Run, target: Target, shape: StepShape) -> int:
    """Bytes on a GPU of the stage that takes most."""
    copies = FP8_COPIES if target.fp8 else 0
    stages = (stage_memory(a, run, shape, stage) for stage in different_stages(run))
    return max(stage.total + copies * stage.parameters for stage in stages)


def _extreme_memory(a: Architecture, run: Run, target: Target, lengths: Lengths) -> int:
    """The same, of the extreme that takes most."""
    return max(_memory(a, run, target, plan_rows(groups, run, a.cost_model)) for groups in lengths.extremes)


def _cuts(run: Run) -> int:
    sizes = (run.tp, run.pp, run.vpp, run.cp)
    return sum(size > 1 for size in sizes) + (run.recompute.granularity is not None)
