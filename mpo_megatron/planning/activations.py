"""Bytes that a row's forward pass keeps for its backward pass, on one rank.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count 34 t h bytes of a GPT layer in 16 bits beside its scores.
The same list is made here for what these layers keep: RMSNorm, grouped queries, SwiGLU, no dropout (so no masks of it),
attention that keeps no scores, and its keys and values once. Sequence parallelism divides what their table divides.
Each term below is a tensor; what is saved was read off `torch.autograd.graph.saved_tensors_hooks` and a test compares
the sums.

Shapes: t tokens that the rank holds, s = t / TP of them under sequence parallelism, e bytes of an element, H hidden
size, Q and K sizes of all queries and of all keys, F feed-forward size, both on a tensor-parallel rank.
"""

from dataclasses import dataclass

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.profile import RowShape
from mpo_megatron.planning.run import Run

_FLOAT32 = 4


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps.

    Attributes:
        before: norm, queries, keys and values up to attention's own inputs.
        core_inputs: what attention is given, and keeps if it is computed again.
        core: what attention keeps beside them.
        after: output projection, norm and feed-forward part.
    """

    before: float
    core_inputs: float
    core: float
    after: float

    @property
    def all(self) -> float:
        return self.before + self.core_inputs + self.core + self.after


def layer_bytes(a: Architecture, run: Run, row: RowShape) -> LayerBytes:
    """Bytes that one layer keeps of a row, nothing computed again."""
    e, t = run.element, row.tokens
    q, k = a.num_heads * a.head_dim // run.tp, a.num_kv_heads * a.head_dim // run.tp
    heads = a.num_heads // run.tp
    s = t // run.sequence_ranks
    # Transformer Engine and the fused RoPE keep one table of angles for all layers (`chunk_bytes`), so does ours on a
    # CPU; Megatron's local one multiplies queries and keys with cosines and sines of their own.
    rope = 4 * t * a.head_dim * e if run.fused and not run.transformer_engine else 0
    qk_norms = 0.0
    if a.block.qk_norm:
        qk_norms = _norm(run, t * q, t * heads) + _norm(run, t * k, t * a.num_kv_heads // run.tp)
    normed = s * a.hidden_size * e
    before = _norm(run, s * a.hidden_size, s) + normed + qk_norms + rope
    return LayerBytes(
        before,
        *_attention(a, run, row, q, k, heads),
        t * q * e + _norm(run, s * a.hidden_size, s) + normed + _feed_forward(a, run, row),
    )


def _norm(run: Run, elements: float, vectors: float) -> float:
    """RMSNorm: its input and the inverse root of each vector."""
    return elements * run.element + vectors * _FLOAT32


def _attention(a: Architecture, run: Run, row: RowShape, q: int, k: int, heads: int) -> tuple[float, float]:
    """(what it is given, what it keeps beside): queries, keys and values once, and of each query the log-normaliser.

    The copies that the backends are given are made again, and so is the row that context-parallel ranks gather. Outputs
    are the output projection's input; only sdpa has them twice, its segments' own beside the row's.
    """
    e, t = run.element, row.tokens
    core = row.tokens * heads * _FLOAT32
    if run.attention == "sdpa":
        core = row.used * (q * e + heads * _FLOAT32)
    if run.recompute.granularity != "selective":
        return t * q * e + 2 * t * k * e, core
    # Values are then a view of the product that queries, keys and values come from, and keep all of it.
    given = t * q * e + t * k * e + t * (q + 2 * k) * e
    if not (run.fused or run.transformer_engine or a.block.qk_norm):
        # So are keys then, which attention itself rotates, and queries where they are one group; a norm copies them.
        given -= t * k * e + (t * q * e if a.num_kv_heads == run.tp else 0)
    return given, core + (t * k * e if run.cp == 1 else 2 * row.row_tokens * k * e)


def _feed_forward(a: Architecture, run: Run, row: RowShape) -> float:
    """The SwiGLU's first product (2 F) and the second's input (F); of experts, unfused, both of its factors too."""
    e, t, f = run.element, row.tokens, a.ffn_hidden_size // run.tp
    if a.experts is None:
        return t * f * 3 * e
    factors = 0 if run.fused else 2
    # With balanced experts each rank's take as many tokens as its tokens go to experts. Unfused, a token's weight
    # is multiplied in apart; its hidden state is copied for each of its experts.
    per_token = a.experts.per_token
    routed = t * per_token
    router = t // run.sequence_ranks * (_FLOAT32 * a.experts.number * 2 + 16 * per_token)
    weighted = 0 if run.fused else 1
    return routed * (f * (3 + factors + weighted) * e + a.hidden_size * e + 2 * _FLOAT32) + router


@dataclass(frozen=True)
class ChunkBytes:
    """What a model chunk keeps of one row.

    Attributes:
        kept: until the row's backward pass.
        again: the most that the backward pass makes again beside it, less what it has given up by then.
    """

    kept: float
    again: float


def chunk_bytes(a: Architecture, run: Run, row: RowShape, layers: int, last: bool) -> ChunkBytes:
    """Of a chunk of so many layers; `last` is the one with the response head."""
    e, s = run.element, row.tokens // run.sequence_ranks
    layer = layer_bytes(a, run, row)
    # The row's own tensors, and the angles that every layer is given.
    rotary = 0.0
    if run.transformer_engine:
        rotary = row.tokens * a.head_dim * _FLOAT32
    elif not run.fused:
        # Its cosines and sines, of half the angles each.
        rotary = row.tokens * a.head_dim * e
    # Keys that are read several times, at most.
    shared = max(0, row.keys - row.predicted)
    given = 34 * row.tokens + 12 * row.predicted + 5 * row.row_tokens + 4 * row.keys + 8 * shared + rotary
    if run.attention == "sdpa":
        given += row.masked * e
    head = 0.0
    if last:
        # Hidden states that predict, and their normalisers; see model.head.
        head = _norm(run, s * a.hidden_size, s) + row.predicted * (a.hidden_size * e + _FLOAT32)
    if run.recompute.granularity == "selective":
        kept = layers * (layer.all - layer.core)
        # When the last layer's scores are computed again, the head and what follows in the layer is done with.
        return ChunkBytes(kept + given + head, max(0.0, layer.core - head - layer.after))
    again = run.recompute.at_a_time(layers) if run.recompute.granularity == "full" else 0
    given_layer = s * a.hidden_size * e
    inputs = run.recompute.checkpoints(layers) * given_layer
    # The first norm keeps the layer's input, which is there already.
    known = given_layer
    plain = layers - run.recompute.layers(layers)
    freed = head + plain * layer.all
    kept = inputs + plain * layer.all + head + given
    return ChunkBytes(kept, max(0.0, again * layer.all - known - freed))
