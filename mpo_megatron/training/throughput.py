"""What the planner expects of a run, said at its start, and what is achieved of it, step by step.

`tflops` are model FLOPs a second and rank (planning.flops): forward and backward over the groups as the run stores
them, without padding, recomputation and first passes. `mfu` is that over the peak of the chip: from a table on a GPU,
on CPU ranks measured at the start. `peak_memory` is rank 0's, in bytes, since the start.
"""

from dataclasses import dataclass

import torch

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.fp8 import row_alignment
from mpo_megatron.planning.communication import step_communication
from mpo_megatron.planning.configuration import run_of
from mpo_megatron.planning.flops import model_flops, step_flops
from mpo_megatron.planning.hardware import find_gpu
from mpo_megatron.planning.memory import GIB, largest_stage
from mpo_megatron.planning.profile import StepShape, step_shape
from mpo_megatron.planning.run import Run, different_stages
from mpo_megatron.runtime.peak import peak_memory, product_rate
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.rows import Positions, RowSource
from mpo_megatron.training.setup import Setup


@dataclass(frozen=True)
class Throughput:
    """What a rank's steps are measured by.

    Attributes:
        peak: FLOP/s of a rank; None: not known.
        peak_of: what has it, for people.
    """

    architecture: Architecture
    source: RowSource
    shared_prompt: bool
    ranks: int
    device: torch.device
    peak: float | None
    peak_of: str

    def of_step(self, positions: Positions, seconds: float) -> dict[str, float]:
        """`tflops`, `mfu` where the peak is known, and `peak_memory`, of a step of the groups at these positions."""
        groups = [self.source.lengths(int(i)) for i in positions]
        flops = model_flops(self.architecture.cost_model, groups, self.shared_prompt)
        rate = flops / seconds / self.ranks
        values = {"tflops": rate / 1e12, "peak_memory": float(peak_memory(self.device))}
        return values if self.peak is None else values | {"mfu": rate / self.peak}


def measure(setup: Setup) -> Throughput:
    """Find the peak. Every rank calls it."""
    layout, options = setup.layout, setup.model_options
    peak: float | None
    if layout.device.type == "cuda":
        name = torch.cuda.get_device_name(layout.device)
        peak, peak_of = gpu_peak(name, options.dtype, options.fp8 is not None)
    else:
        peak = product_rate(options.dtype)
        peak_of = f"{peak / 1e9:.0f} GFLOP/s a rank, measured in matrix products now"
    return Throughput(
        setup.architecture,
        setup.train.source,
        setup.config.model.pack.shared_prompt,
        layout.world_size,
        layout.device,
        peak,
        peak_of,
    )


def gpu_peak(name: str, dtype: torch.dtype, fp8: bool) -> tuple[float | None, str]:
    """(peak FLOP/s of a device name or None, what to say of it)."""
    gpu = find_gpu(name)
    if dtype != torch.bfloat16:
        return None, "not known of float32 products; mfu is left out"
    if gpu is None or (fp8 and gpu.fp8 is None):
        return None, f"not known of {name}; mfu is left out (mpo_megatron/planning/hardware.py has the table)"
    return gpu.peak(
        fp8
    ), f"{gpu.peak(fp8) / 1e12:.0f} TFLOP/s of {gpu.name}, {'fp8' if fp8 else 'bf16'} without sparsity"


def expectation(setup: Setup, throughput: Throughput) -> list[str]:
    """The planner's lines of a run's first step."""
    a, run, shape = setup.architecture, planned_run(setup), first_step(setup)
    stage = largest_stage(a, run, shape)
    parts = {
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer": stage.optimizer,
        "activations": stage.activations,
        "temporary": stage.temporary,
    }
    flops = step_flops(a, run, shape)
    return [
        f"planned     {stage.total / GIB:.2f} GiB on each rank of the largest stage: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()),
        f"            {flops.model(run.shared_prompt) / 1e12:.4g} TFLOP in the first step, "
        f"{flops.repeated / 1e12:.4g} with repeated prompts; {_traffic(a, run, shape)}",
        f"peak        {throughput.peak_of}",
    ]


def _traffic(a: Architecture, run: Run, shape: StepShape) -> str:
    stages = [step_communication(a, run, shape, stage) for stage in different_stages(run)]
    most = max(stages, key=lambda traffic: sum(found.sent for found in traffic.values()))
    if not most:
        return "no communication"
    return "a rank sends " + ", ".join(f"{found.sent / 1e9:.3g} GB of {kind}" for kind, found in most.items())


def planned_run(setup: Setup) -> Run:
    """The run as the planner takes it."""
    layout, options = setup.layout, setup.model_options
    return run_of(
        setup.config,
        dp=layout.dp,
        transformer_engine=options.transformer_engine,
        fused=layout.device.type == "cuda",
        attention=options.attention_backend,
        token_multiple=row_alignment(
            options.fp8, layout.tp, layout.device, setup.config.model.pack.pad_to_multiple_of
        ),
        two_passes=setup.entry.needs_global_batch,
    )


def first_step(setup: Setup) -> StepShape:
    """The rows of the run's first step."""
    source, positions = setup.train.source, setup.train.steps[0]
    groups: list[GroupLengths] = [source.lengths(int(i)) for i in positions]
    return step_shape(source.plan(positions), groups, planned_run(setup))
