"""The parameters of each rank, and what of them the optimizer and the gradients take.

Shapes are those of Megatron's GPTModel as `model.provider` builds it (rows of column-parallel weights and columns of
row-parallel ones over tensor-parallel ranks, norms on each); a test compares them with the model itself.
"""

import math
from dataclasses import dataclass

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.run import Run

# Megatron's distributed optimizer begins each parameter at a multiple of 64 elements and ends a bucket at a multiple of
# 128 and of its ranks (megatron/core/distributed/param_and_grad_buffer.py, _ParamAndGradBuffer).
_START, _END = 64, 128


@dataclass(frozen=True)
class Parameters:
    """Parameters of one model chunk on a rank, in the model's order, by what shares them.

    Attributes:
        dense: numbers of elements of those that all data- and context-parallel ranks hold.
        experts: of those of the experts.
        replicated: elements of `dense` that every tensor-parallel rank holds: norms, router.
        shared_embedding: which of `dense` is a tied embedding that another stage holds too.
    """

    dense: tuple[int, ...]
    experts: tuple[int, ...]
    replicated: int
    shared_embedding: int | None

    @property
    def count(self) -> int:
        return sum(self.dense) + sum(self.experts)


def chunk_parameters(a: Architecture, run: Run, stage: int, chunk: int) -> Parameters:
    """Of chunk number `chunk` of pipeline stage `stage`, on each of its tensor-parallel ranks."""
    first = stage == 0 and chunk == 0
    last = stage == run.pp - 1 and chunk == run.vpp - 1
    h, layers = a.hidden_size, run.chunks(a.num_layers, stage)[chunk]
    qkv = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim // run.tp
    vocabulary = a.padded_vocab_size(run.vocab_multiple, run.tp) // run.tp * h
    ffn = a.ffn_hidden_size // run.tp

    # As Megatron names them: projection, norms of queries and keys, qkv, then what the layer has besides.
    norms = [a.head_dim] * 2 if a.block.qk_norm else []
    router = [] if a.experts is None else [a.experts.number * h]
    attention = [a.num_heads * a.head_dim // run.tp * h, qkv * h, *([qkv] if a.block.qkv_bias else [])]
    swiglu = [2 * ffn * h, ffn * h]
    layer = [h, *attention, *norms, h, *(swiglu if a.experts is None else router)]
    dense = layer * layers
    experts = [] if a.experts is None else swiglu * (a.experts.number // run.ep) * layers
    replicated = layers * (2 * h + sum(norms) + sum(router))
    shared = None
    if first:
        shared = 0 if a.tied_embeddings and run.pp > 1 else None
        dense = [vocabulary, *dense]
    if last:
        dense, replicated = [*dense, h], replicated + h
        if not a.tied_embeddings:
            dense.append(vocabulary)
        elif not first:
            shared = len(dense)
            dense.append(vocabulary)
    return Parameters(tuple(dense), tuple(experts), replicated, shared)


def stage_parameters(a: Architecture, run: Run, stage: int) -> list[Parameters]:
    """Of each chunk of a pipeline stage."""
    return [chunk_parameters(a, run, stage, chunk) for chunk in range(run.vpp)]


def buffers(parameters: Parameters, run: Run) -> tuple[int, int]:
    """Elements of Megatron's contiguous buffers of a chunk: (dense parameters, experts), padding included.

    As of one bucket for all, but for a shared embedding, which with the distributed optimizer has one of its own. Where
    reductions overlap with the backward pass there are more, each padded by less than a thousandth of its size.
    """
    if not run.distributed_optimizer:
        return sum(parameters.dense), sum(parameters.experts)
    dense = parameters.dense
    if parameters.shared_embedding is None:
        buckets = [dense]
    else:
        at = parameters.shared_embedding
        buckets = [dense[:at], dense[at : at + 1], dense[at + 1 :]]
    return sum(_padded(bucket, run.replicas) for bucket in buckets), _padded(
        parameters.experts, expert_replicas(run)
    )


def bucket_size(run: Run) -> int:
    """Elements of a bucket where reductions overlap with the backward pass: Megatron's choice."""
    return max(40_000_000, 1_000_000 * run.replicas)


def expert_replicas(run: Run) -> int:
    """Ranks that hold the same experts."""
    return run.replicas // run.ep


def _padded(elements: tuple[int, ...], ranks: int) -> int:
    if not elements:
        return 0
    end = 0
    for size in reversed(elements):
        end = math.ceil(end / _START) * _START + size
    unit = math.lcm(ranks, _END)
    return math.ceil(end / unit) * unit
