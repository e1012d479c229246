"""How long a step takes: the slowest stage's computing and talking, the pipeline's bubble, and the gradients.

A model of time, not a measurement, to rank layouts by. Compute is computed FLOPs at a part of the chip's peak
(`efficiency`), and the scheduler's cost of a row besides what it holds. Every byte is sent at the link's rate. Where
they overlap, sums of gradients hide under the last row's backward pass, all but the last bucket, and weights that are
fetched under the first row's forward pass, all but the first bucket; on later stages, under what the first one computes
meanwhile. Nothing else overlaps. Ranks lie as Megatron orders them: TP within CP within DP within PP. The interleaved
bubble is that of Narayanan et al. 2021 (arXiv 2104.04473): (PP - 1) / VPP rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.communication import Kind, Traffic, step_communication
from mpo_megatron.planning.flops import forward_flops, row_flops, step_flops
from mpo_megatron.planning.hardware import Machine
from mpo_megatron.planning.parameters import bucket_size, buffers, chunk_parameters
from mpo_megatron.planning.profile import RowShape, StepShape
from mpo_megatron.planning.run import Run, different_stages
from mpo_megatron.scheduling.plan import ROW_OVERHEAD_TOKENS

_REPLICAS = ("DP", "expert DP")


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
    row = (compute + talking) / rows
    bubble = row * run.pipeline.idle_rows
    gradients = max(_once_a_step(a, run, shape, machine, stage, row) for stage in {0, run.pp - 1})
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


def _once_a_step(
    a: Architecture, run: Run, shape: StepShape, machine: Machine, stage: int, row: float
) -> float:
    """Seconds that a stage waits for gradients and weights, if a row's forward and backward pass take `row`."""
    traffic = step_communication(a, run, _no_rows(shape), stage)
    of_replicas = {kind: found for kind, found in traffic.items() if kind.dimension in _REPLICAS}
    weights = {kind: found for kind, found in of_replicas.items() if kind.call == "all-gather"}
    sums = {kind: found for kind, found in of_replicas.items() if kind.call != "all-gather"}
    rows_between = 1 if stage == 0 else run.pp - 1
    # Buckets on the first stage alone: the others are through before it.
    buckets = (
        max(1, sum(buffers(chunk_parameters(a, run, 0, 0), run)) // bucket_size(run)) if stage == 0 else 1
    )
    alone = 1 / buckets if stage == 0 else 0.0

    def waits(found: Mapping[Kind, Traffic], overlaps: bool, hidden: float) -> float:
        seconds = _seconds(found, run, machine, _REPLICAS)
        return max(seconds * alone, seconds - hidden * rows_between) if overlaps else seconds

    return (
        waits(sums, run.overlap_grad_reduce, row * 2 / 3)
        + waits(weights, run.overlap_param_gather, row / 3)
        + _seconds(traffic, run, machine, ("embedding",))
    )


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
