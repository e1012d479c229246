"""What the planner says of a step and what the step does, on the ranks. Imported by the ranks."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_megatron.data import GroupList, TokenizedGroup
from mpo_megatron.model import attention
from mpo_megatron.model.provider import unwrap
from mpo_megatron.planning.communication import step_communication
from mpo_megatron.planning.flops import step_flops
from mpo_megatron.planning.memory import stage_memory
from mpo_megatron.planning.profile import StepShape, step_shape
from mpo_megatron.planning.run import Recompute, Run
from tests.distributed.faults import replaced
from tests.distributed.jobs import Layout, Model, build, gradients
from tests.helpers import flash
from tests.helpers.flops import CountedFlops
from tests.helpers.saved import saved_bytes
from tests.helpers.traffic import Traffic


@dataclass(frozen=True)
class Lengths:
    """Groups of one prompt and responses of these lengths, over and over."""

    prompt: int
    responses: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Found:
    """On one rank: what was planned and what was measured."""

    planned: float
    measured: float
    rows: int
    detail: dict[str, Any] = field(default_factory=dict)


def build_with(folder: Path, lengths: Lengths, wanted: Layout) -> tuple[Model, Run, StepShape]:
    """The model over groups of these lengths, and the planner's record of both."""
    model = build(folder, [1], wanted)
    random = np.random.default_rng(0)
    vocabulary = model.architecture.vocab_size
    scores = np.arange(float(len(lengths.responses)))
    model.source.dataset = GroupList(
        [
            TokenizedGroup(
                str(i),
                random.integers(0, vocabulary, lengths.prompt),
                [random.integers(0, vocabulary, n) for n in lengths.responses],
                scores,
                scores > scores.mean(),
            )
            for i in range(lengths.groups)
        ]
    )
    run = run_of(model, wanted)
    positions = range(lengths.groups)
    plan = model.source.plan(positions)
    return model, run, step_shape(plan, [model.source.lengths(i) for i in positions], run)


def run_of(model: Model, wanted: Layout) -> Run:
    layout, options = model.layout, wanted.options
    recompute = Recompute(
        *(options.get(f"recompute_{name}") for name in ("granularity", "method", "num_layers"))
    )
    return Run(
        tp=layout.tp, pp=layout.pp, vpp=layout.vpp, cp=layout.cp, dp=layout.dp, ep=layout.ep,
        sequence_parallel=options.get("sequence_parallel", wanted.tp > 1),
        recompute=recompute,
        element=wanted.precision.itemsize,
        transformer_engine=options.get("transformer_engine", False),
        fused=False,
        attention="sdpa",
        distributed_optimizer=wanted.distributed_optimizer,
        head_chunk=options.get("head_chunk_size", 7),
        token_multiple=model.source.alignment // layout.cp,
        max_tokens=wanted.max_tokens,
        shared_prompt=wanted.shared_prompt,
    )  # fmt: skip


def one_step(model: Model) -> None:
    size = int(model.source.dataset.response_offsets[-1])
    gradients(model, torch.zeros(size), "wmpo")


def saved_by_a_step(folder: Path, lengths: Lengths, wanted: Layout) -> Found:
    """The most bytes that autograd keeps at a time in a step, against the planner's activations of the stage."""
    return _saved(*build_with(folder, lengths, wanted))


def saved_as_on_a_gpu(folder: Path, lengths: Lengths, wanted: Layout) -> Found:
    """The same with what a GPU run has: `varlen` attention over a kernel that keeps what FlashAttention's keeps, and
    Megatron's fused SwiGLU.
    """
    with replaced(attention, "make_backend", lambda *args: attention.varlen(flash.kernel)):
        model, run, shape = build_with(folder, lengths, wanted)
    for chunk in model.chunks:
        unwrap(chunk).config.bias_activation_fusion = True
    return _saved(model, replace(run, attention="varlen", fused=True), shape)


def _saved(model: Model, run: Run, shape: StepShape) -> Found:
    parameters = [p for chunk in model.chunks for p in chunk.parameters()]
    parameters += [p.main_grad for p in parameters]
    one_step(model)
    with saved_bytes(parameters) as counter:
        one_step(model)
    memory = stage_memory(model.architecture, run, shape, model.layout.pp_rank)
    return Found(memory.activations, counter.peak, shape.rows_per_rank, {"left": counter.live})


def flops_of_a_step(folder: Path, lengths: Lengths, wanted: Layout) -> Found:
    """FLOPs of a step of all ranks by the planner, against those that run on this rank."""
    model, run, shape = build_with(folder, lengths, wanted)
    with CountedFlops() as counter:
        one_step(model)
    planned = step_flops(model.architecture, run, shape)
    return Found(
        planned.computed,
        counter.total,
        shape.rows_per_rank,
        {"shared": planned.shared, "repeated": planned.repeated, "attention": counter.attention},
    )


# Smaller payloads steer a step: numbers of groups, metrics, norms, sums of log-probs.
CONTROL = 256


def traffic_of_a_step(folder: Path, lengths: Lengths, wanted: Layout) -> dict[str, dict[str, float]]:
    """Payloads of a step with its update by kind of communication: `planned` and `counted`, and `small`, the bytes of
    all that is below CONTROL.
    """
    model, run, shape = build_with(folder, lengths, wanted)
    one_step(model)
    model.optimizer.step()
    with Traffic(CONTROL) as traffic:
        one_step(model)
        model.optimizer.step()
    layout = model.layout
    planned = step_communication(
        model.architecture, run, shape, layout.pp_rank, layout.dp_rank, layout.cp_rank
    )
    return {
        "planned": {str(kind): found.payload for kind, found in planned.items()},
        "counted": {f"{group} {call}": float(size) for (group, call), size in traffic.payload.items()},
        "small": {"all": float(traffic.small)},
    }
