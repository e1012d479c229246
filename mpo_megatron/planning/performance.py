"""How long a step takes: the slowest stage's computing and talking, the pipeline's bubble, and the gradients.

A model of time, not a measurement, to rank layouts by. Compute is computed FLOPs at a part of the chip's peak
(`efficiency`), and the scheduler's cost of a row besides what it holds. Every byte is sent at the link's rate and
nothing overlaps, as in this package's runs, whose reductions do not. Ranks lie as Megatron orders them: TP within CP
within DP within PP. The interleaved bubble is that of Narayanan et al. 2021 (arXiv 2104.04473): (PP - 1) / VPP rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.communication import Kind, Traffic, step_communication
from mpo_megatron.planning.flops import forward_flops, row_flops, step_flops
from mpo_megatron.planning.hardware import Machine
from mpo_megatron.planning.profile import RowShape, StepShape
from mpo_megatron.planning.run import Run, different_stages
from mpo_megatron.scheduling.plan import ROW_OVERHEAD_TOKENS

_ONCE_A_STEP = ("DP", "expert DP", "embedding")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and what follows.

    Attributes:
        compute: of the slowest stage over its rows.
        communication: of that stage while it computes, and of the gradients after it.
        bubble: in which the pipeline fills and drains.
        model_flops: of the step on all ranks.
    """

    compute: float
    communication: float
    bubble: float
    model_flops: float
    groups: int

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.bubble

    @property
    def groups_per_second(self) -> float:
        return self.groups / self.seconds

    @property
    def bubble_fraction(self) -> float:
        """The part of the step that a stage waits for the pipeline."""
        return self.bubble / self.seconds

    def mfu(self, machine: Machine, fp8: bool = False) -> float:
        return self.model_flops / self.seconds / machine.gpus / machine.gpu.peak(fp8)


def step_time(a: Architecture, run: Run, shape: StepShape, machine: Machine, efficiency: float) -> StepTime:
    """Time of a step, by its slowest stage and costliest data-parallel rank."""
    rate = machine.gpu.peak(run.fp8) * efficiency
    slowest = max(
        (_stage_seconds(a, run, shape, stage, machine, rate) for stage in different_stages(run)), key=sum
    )
    compute, talking = slowest
    rows = shape.rows_per_rank + shape.first_pass / 3
    bubble = (compute + talking) / rows * run.pipeline.idle_rows
    gradients = max(
        _seconds(step_communication(a, run, _no_rows(shape), stage), run, machine, _ONCE_A_STEP)
        for stage in (0, run.pp - 1)
    )
    model = step_flops(a, run, shape).model(run.shared_prompt)
    return StepTime(compute, talking + gradients, bubble, model, len(shape.groups))


def groups_per_second(
    model_flops: float, groups: int, machine: Machine, mfu: float, fp8: bool = False
) -> float:
    """Groups/s of a step of so many model FLOPs at a given MFU."""
    return groups * mfu * machine.gpu.peak(fp8) * machine.gpus / model_flops


def _stage_seconds(
    a: Architecture, run: Run, shape: StepShape, stage: int, machine: Machine, rate: float
) -> tuple[float, float]:
    """(computing, talking) of one stage over all rows, on the data-parallel rank for which it takes longest."""
    layers = sum(run.chunks(a.num_layers, stage)) / a.num_layers
    last = stage == run.pp - 1

    def flops(row: RowShape, first_pass: bool) -> float:
        head = a.cost_model.forward(0, 0, row.predicted)
        whole = row_flops(a, run, row) + first_pass * forward_flops(a.cost_model, row)
        of_head = head * (4 + first_pass)
        return (whole - of_head) * layers + of_head * last

    overhead = 3 * a.cost_model.forward(ROW_OVERHEAD_TOKENS, 0, 0) * layers
    totals = [
        sum(
            times * (max(flops(row, twice) for row in context) / run.tp + overhead)
            for (context, twice), times in rank.items()
        )
        for rank in shape.counted
    ]
    costliest = max(range(len(totals)), key=totals.__getitem__)
    traffic = step_communication(a, run, shape, stage, costliest)
    return totals[costliest] / rate, _seconds(traffic, run, machine, ("TP", "PP", "CP", "EP"))


def _seconds(
    traffic: Mapping[Kind, Traffic], run: Run, machine: Machine, dimensions: tuple[str, ...]
) -> float:
    reach = {
        "TP": run.tp, "CP": run.tp * run.cp, "EP": run.tp * run.ep, "DP": run.tp * run.replicas,
        "expert DP": run.tp * run.replicas, "PP": run.world, "embedding": run.world,
    }  # fmt: skip
    return sum(
        found.sent / machine.bandwidth(reach[kind.dimension])
        for kind, found in traffic.items()
        if kind.dimension in dimensions
    )


def _no_rows(shape: StepShape) -> StepShape:
    return StepShape(((),), 0, shape.groups)
