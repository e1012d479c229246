"""What a rank sends to others in a step, by kind, as Megatron-core makes the calls.

The **payload** of a collective is the whole tensor that it is of: what an all-gather puts together, what a
reduce-scatter or an all-reduce adds up, what an all-to-all takes in; of a send, what is sent. A ring sends
(n - 1) / n of it from each of n ranks, for an all-reduce twice as much: `Traffic.sent`.

Not counted: numbers of a few bytes that steer a step (numbers of groups, metrics, gradient norm, and the sums of
log-probabilities over context-parallel ranks).

Sources, in megatron/core: tensor_parallel/layers.py and mappings.py (tensor parallelism), distributed/ (data
parallelism, gradients of norms and tied embeddings), pipeline_parallel/schedules.py,
transformer/moe/token_dispatcher.py (MoEAlltoAllTokenDispatcher).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.parameters import buffers, expert_replicas, stage_parameters
from mpo_megatron.planning.profile import RowShape, StepShape
from mpo_megatron.planning.run import Run

_FLOAT32 = 4
_SENT = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


@dataclass(frozen=True)
class Kind:
    """A kind of communication: a dimension of the layout (TP, PP, CP, DP, EP, or the tied embeddings' pair) and the
    call.
    """

    dimension: str
    call: str

    def __str__(self) -> str:
        return f"{self.dimension} {self.call}"


@dataclass(frozen=True)
class Traffic:
    """Payload of a rank's calls of one kind in a step, in bytes, and how many ranks they are among."""

    payload: float
    ranks: int
    calls: int
    call: str

    @property
    def sent(self) -> float:
        """Bytes that leave the rank if the call is a ring's."""
        if self.call == "send":
            return self.payload
        return self.payload * _SENT[self.call] * (self.ranks - 1) / self.ranks


class _Count:
    """Adds calls up by kind; calls among one rank are none. Each counts `times` times."""

    def __init__(self, run: Run) -> None:
        self.ranks = {
            "TP": run.tp, "PP": run.pp, "CP": run.cp, "DP": run.replicas, "EP": run.ep,
            "expert DP": expert_replicas(run), "embedding": 2,
        }  # fmt: skip
        self.times = 1
        self.payload: dict[Kind, float] = defaultdict(float)
        self.calls: dict[Kind, int] = defaultdict(int)

    def add(self, dimension: str, call: str, payload: float, times: int = 1) -> None:
        if self.ranks[dimension] > 1 and payload and times:
            self.payload[Kind(dimension, call)] += payload * times * self.times
            self.calls[Kind(dimension, call)] += times * self.times

    def total(self) -> dict[Kind, Traffic]:
        return {
            kind: Traffic(payload, self.ranks[kind.dimension], self.calls[kind], kind.call)
            for kind, payload in self.payload.items()
        }


def step_communication(
    a: Architecture, run: Run, shape: StepShape, stage: int, dp_rank: int = 0, cp_rank: int = 0
) -> Mapping[Kind, Traffic]:
    """Of a rank of a pipeline stage, over a whole step."""
    count = _Count(run)
    for (context, twice), count.times in shape.counted[dp_rank].items():
        row = context[cp_rank]
        for chunk, layers in enumerate(run.chunks(a.num_layers, stage)):
            first = stage == 0 and chunk == 0
            last = stage == run.pp - 1 and chunk == run.vpp - 1
            if twice:
                _forward(count, a, run, row, layers, first, last)
            _forward(count, a, run, row, layers, first, last)
            _backward(count, a, run, row, layers, first, last)
    count.times = 1
    _gradients(count, a, run, stage)
    return count.total()


def _forward(
    count: _Count, a: Architecture, run: Run, row: RowShape, layers: int, first: bool, last: bool
) -> None:
    hidden = row.tokens * a.hidden_size * run.element
    _layers_forward(count, a, run, row, layers)
    if run.sequence_parallel:
        count.add("TP", "reduce-scatter", hidden, int(first))  # the embedding's
        count.add("TP", "all-gather", hidden, int(last))  # the head's
    else:
        count.add("TP", "all-reduce", hidden, int(first))
    if last:  # of the head's normalisers: peaks, then sums and logits
        count.add("TP", "all-reduce", row.predicted * _FLOAT32 * 3)
    count.add("PP", "send", hidden / run.sequence_ranks, int(not last))


def _layers_forward(count: _Count, a: Architecture, run: Run, row: RowShape, layers: int) -> None:
    hidden = row.tokens * a.hidden_size * run.element
    sums = 1 if a.experts else 2
    if run.sequence_parallel:
        count.add("TP", "all-gather", hidden, sums * layers)
        count.add("TP", "reduce-scatter", hidden, sums * layers)
    else:
        count.add("TP", "all-reduce", hidden, sums * layers)
    _keys_and_values(count, a, run, row, "all-gather", layers)
    _experts(count, a, run, row, layers)


def _keys_and_values(count: _Count, a: Architecture, run: Run, row: RowShape, call: str, times: int) -> None:
    size = 2 * a.num_kv_heads * a.head_dim // run.tp
    count.add("CP", call, row.row_tokens * size * run.element, times)


def _experts(count: _Count, a: Architecture, run: Run, row: RowShape, layers: int) -> None:
    """Tokens to their experts and back; forward and backward pass do the same, the other way round.

    The experts' balance decides what a rank receives, and not what it sends. Tensor-parallel ranks share each expert
    and gather its tokens; no test counts these calls, which on CPU ranks are others than on GPUs.
    """
    if a.experts is None:
        return
    routed = row.tokens * a.experts.per_token
    own = routed / run.sequence_ranks
    count.add("EP", "all-to-all", own * (2 * a.hidden_size * run.element + _FLOAT32), layers)
    count.add("TP", "all-gather", routed * (a.hidden_size * run.element + _FLOAT32), layers)
    count.add("TP", "reduce-scatter", routed * a.hidden_size * run.element, layers)


def _backward(
    count: _Count, a: Architecture, run: Run, row: RowShape, layers: int, first: bool, last: bool
) -> None:
    hidden = row.tokens * a.hidden_size * run.element
    _layers_forward(count, a, run, row, run.recompute.layers(layers))
    sums = 1 if a.experts else 2
    if run.sequence_parallel:
        # The inputs of column-parallel products are gathered once more, and gradients of row-parallel ones' outputs.
        count.add("TP", "all-gather", hidden, 2 * sums * layers + int(first))
        count.add("TP", "reduce-scatter", hidden, sums * layers + int(last))
    else:
        count.add("TP", "all-reduce", hidden, sums * layers + int(last))
    if run.recompute.granularity != "full":  # there the layers that run again have done it
        _keys_and_values(count, a, run, row, "all-gather", layers)
    _keys_and_values(count, a, run, row, "reduce-scatter", layers)
    _experts(count, a, run, row, layers)
    count.add("PP", "send", hidden / run.sequence_ranks, int(not first))


def _gradients(count: _Count, a: Architecture, run: Run, stage: int) -> None:
    """Once a step: gradients over the replicas, then the weights that each has updated.

    Where there are experts, Megatron has two optimizers in one, and each gathers the weights of both, unless the next
    forward pass does.
    """
    optimizers = 1 if a.experts is None or run.overlap_param_gather else 2
    for chunk in stage_parameters(a, run, stage):
        for dimension, elements in zip(("DP", "expert DP"), buffers(chunk, run), strict=True):
            if run.distributed_optimizer:
                count.add(dimension, "reduce-scatter", elements * _FLOAT32)
                count.add(dimension, "all-gather", elements * run.element, optimizers)
            else:
                count.add(dimension, "all-reduce", elements * _FLOAT32)
        if chunk.shared_embedding is not None:
            count.add("embedding", "all-reduce", chunk.dense[chunk.shared_embedding] * _FLOAT32)
    layers = sum(run.chunks(a.num_layers, stage))
    if run.sequence_parallel:
        count.add("TP", "all-reduce", sum(c.replicated for c in stage_parameters(a, run, stage)) * _FLOAT32)
    elif a.block.qk_norm:
        count.add("TP", "all-reduce", 2 * a.head_dim * layers * _FLOAT32)
