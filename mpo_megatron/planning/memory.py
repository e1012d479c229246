"""Bytes on each GPU, by pipeline stage: weights, gradients, optimizer, activations, and what a step needs for a while.

What this package's training holds (training.optimizer, Megatron's DistributedDataParallel and optimizers):

- weights in the model's type, in Megatron's contiguous buffers; in FP8 also their casts, one as it is and one
  transposed, which Transformer Engine keeps over the rows of a step (the embedding has none: it is counted in vain);
- gradients in float32 buffers of the same sizes (`grad_reduce_in_fp32`), whole on every rank;
- Adam's two float32 moments and, of bf16 weights, float32 masters, shared among the data- and context-parallel ranks by
  the distributed optimizer: 12 bytes a weight over all of them;
- no second model: the reference's log-probabilities are cached.

Activations are exact to what autograd keeps (`activations`); temporary memory is an estimate of the largest moment.
"""

from dataclasses import dataclass

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning import activations
from mpo_megatron.planning.parameters import buffers, expert_replicas, stage_parameters
from mpo_megatron.planning.profile import StepShape
from mpo_megatron.planning.run import Run, different_stages

_FLOAT32 = 4
GIB = 2**30
_FP8_CASTS = 2  # bytes of a weight
# CUDA's context, NCCL's buffers and cuBLAS's workspaces, and what the allocator cannot use: an allowance, not measured
# on this package's runs.
RESERVED = 3 * GIB


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage, at the most that a step holds.

    Attributes:
        parameters: the number of the rank's parameters.
        in_flight: forward passes of chunks whose backward pass is to come.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    in_flight: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def step_memory(a: Architecture, run: Run, shape: StepShape) -> list[StageMemory]:
    """Of every pipeline stage."""
    return [stage_memory(a, run, shape, stage) for stage in range(run.pp)]


def largest_stage(a: Architecture, run: Run, shape: StepShape) -> StageMemory:
    """Of the stage that holds most."""
    return max(
        (stage_memory(a, run, shape, stage) for stage in different_stages(run)), key=lambda stage: stage.total
    )


def stage_memory(a: Architecture, run: Run, shape: StepShape, stage: int) -> StageMemory:
    """Of one pipeline stage, with every row as large as the step's largest."""
    parameters = stage_parameters(a, run, stage)
    sizes = [buffers(chunk, run) for chunk in parameters]
    dense, experts = (sum(size) for size in zip(*sizes, strict=True))
    state = (3 if run.element == 2 else 2) * _FLOAT32
    shares = (run.replicas, expert_replicas(run)) if run.distributed_optimizer else (1, 1)
    kept, in_flight = _activations(a, run, shape, stage)
    count = sum(chunk.count for chunk in parameters)
    return StageMemory(
        parameters=count,
        weights=(dense + experts) * run.element + (count * _FP8_CASTS if run.fp8 else 0),
        gradients=(dense + experts) * _FLOAT32,
        optimizer=dense // shares[0] * state + experts // shares[1] * state,
        activations=kept,
        temporary=_temporary(a, run, shape, stage, in_flight),
        in_flight=in_flight,
    )


def _activations(a: Architecture, run: Run, shape: StepShape, stage: int) -> tuple[int, int]:
    """(the most bytes that autograd keeps at a time, forward passes in flight)."""
    layers = run.chunks(a.num_layers, stage)
    chunks = [
        activations.chunk_bytes(a, run, shape.largest, layers[i], stage == run.pp - 1 and i == run.vpp - 1)
        for i in range(run.vpp)
    ]
    warmup = warmup_passes(run, stage, shape.rows_per_rank)
    total = shape.rows_per_rank * run.vpp
    live = peak = sum(chunks[chunk_of(run, k)].kept for k in range(min(warmup, total)))
    # Then one forward pass, one backward pass. After two rounds of all stages and chunks it repeats itself.
    for k in range(min(total, warmup + 2 * run.pp * run.vpp)):
        if warmup + k < total:
            live += chunks[chunk_of(run, warmup + k)].kept
        back = chunks[run.vpp - 1 - chunk_of(run, k)]
        peak = max(peak, live + back.again)
        live -= back.kept
    return round(peak), min(total, warmup + 1)


def warmup_passes(run: Run, stage: int, rows: int) -> int:
    """Forward passes of chunks before the first backward pass follows one.

    megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches.
    """
    if run.vpp == 1:
        return min(rows, run.pp - stage - 1)
    return min(rows * run.vpp, 2 * (run.pp - stage - 1) + (run.vpp - 1) * run.pp)


def chunk_of(run: Run, k: int) -> int:
    """Which chunk the k-th forward pass of an interleaved schedule is of: PP rows through each chunk in turn."""
    return k // run.pp % run.vpp


def _temporary(a: Architecture, run: Run, shape: StepShape, stage: int, in_flight: int) -> int:
    """What is neither kept by autograd nor there all the time, at the largest of three moments.

    The head's backward pass: logits of a chunk in float32 and as operands of a product, and the gradient of the
    predicting states in float32. A layer's: gradients of the feed-forward part's first product and second's input, the
    gathered input, the largest weight's gradient, and keys and values as the segments read them with their gradients,
    of which shared ones are summed in float32. Between them what the pipeline's schedule holds: each pass's input and
    output.
    """
    row, e = shape.largest, run.element
    h, f = a.hidden_size, a.ffn_hidden_size // run.tp
    routed = row.tokens * (1 if a.experts is None else a.experts.per_token)
    layer = routed * 3 * f * e + 2 * row.tokens * h * e + 2 * h * f * e
    layer += row.keys * a.num_kv_heads * a.head_dim // run.tp * (4 * e + _FLOAT32)
    held = 0
    if run.pp > 1:
        held = in_flight * 2 * row.tokens // run.sequence_ranks * h * e
    head = 0
    if stage == run.pp - 1:
        rows = a.padded_vocab_size(run.vocab_multiple, run.tp) // run.tp
        logits = min(run.head_chunk, max(row.predicted, 1)) * rows * (_FLOAT32 + e)
        head = logits + row.predicted * h * (_FLOAT32 + e) + 2 * row.tokens * h * e
    return max(layer, head) + held
