"""How weights of a Hugging Face checkpoint become one tensor-parallel rank's Megatron weight, and back. Pure functions.

Each kind of weight is a pair: `cut(sources, cut) -> shard` reads just the rows or columns that the rank needs
from lazily opened tensors, and `join(shards, cut) -> sources` rebuilds the Hugging Face tensors from the
shards of all ranks.

Shapes: H hidden size, D head size, Q query heads, K key-value heads, F feed-forward size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.model.architecture import Architecture

# A tensor that is read when it is indexed: safetensors' PySafeSlice, or a torch tensor.
Lazy = Any


@dataclass(frozen=True)
class Cut:
    """Which shard: rank `rank` of `size` tensor-parallel ranks, and what it is a shard of."""

    architecture: Architecture
    padded_vocab_size: int
    rank: int
    size: int

    def span(self, length: int) -> slice:
        """This rank's part of `length` rows, columns or heads."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class Kind:
    """A kind of weight: see the module's docstring."""

    cut: Callable[[Sequence[Lazy], Cut], Tensor]
    join: Callable[[Sequence[Tensor], Cut], list[Tensor]]


def _cut_columns(sources: Sequence[Lazy], cut: Cut) -> Tensor:
    (source,) = sources
    return source[:, cut.span(_shape(source)[1])]


def _cut_vocabulary(sources: Sequence[Lazy], cut: Cut) -> Tensor:
    """[padded V / ranks, H]: the rank's rows of the padded vocabulary; rows of padding are zero."""
    (source,) = sources
    vocab_size = _rows(source)
    span = cut.span(cut.padded_vocab_size)
    real = source[min(span.start, vocab_size) : min(span.stop, vocab_size)]
    padding = real.new_zeros(span.stop - span.start - real.size(0), *real.shape[1:])
    return torch.cat((real, padding)) if len(padding) else real


def _join_vocabulary(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    return [_concatenate(shards)[: cut.architecture.vocab_size]]


def _cut_gate_up(sources: Sequence[Lazy], cut: Cut) -> Tensor:
    """[2F / ranks, H]: this rank's rows of the gate, then its rows of the up projection."""
    return torch.cat([source[cut.span(_rows(source))] for source in sources])


def _join_gate_up(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [_concatenate([half[i] for half in halves]) for i in (0, 1)]


def _cut_qkv(sources: Sequence[Lazy], cut: Cut) -> Tensor:
    """[(Q + 2K) D / ranks, H], of biases [(Q + 2K) D / ranks]: for each key-value head, its query heads, then the key,
    then the value.
    """
    architecture = cut.architecture
    size, kv_heads = architecture.head_dim, architecture.num_kv_heads
    per_group = architecture.num_heads // kv_heads
    heads = cut.span(kv_heads)
    grouped = []
    for source, heads_per_group in zip(sources, (per_group, 1, 1), strict=True):
        rows_per_group = heads_per_group * size
        rows = source[heads.start * rows_per_group : heads.stop * rows_per_group]
        grouped.append(rows.reshape(heads.stop - heads.start, rows_per_group, *rows.shape[1:]))
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _join_qkv(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    architecture = cut.architecture
    size, kv_heads = architecture.head_dim, architecture.num_kv_heads
    per_group = architecture.num_heads // kv_heads
    whole = _concatenate(shards)
    grouped = whole.reshape(kv_heads, (per_group + 2) * size, *whole.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([per_group * size, size, size], dim=1)]


def _concatenate(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat that copies nothing where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _shape(source: Lazy) -> Sequence[int]:
    return source.get_shape() if hasattr(source, "get_shape") else source.shape


def _rows(source: Lazy) -> int:
    return _shape(source)[0]


REPLICATED = Kind(lambda sources, cut: sources[0][:], lambda shards, cut: [shards[0]])
COLUMNS = Kind(_cut_columns, lambda shards, cut: [_concatenate(shards, dim=1)])
VOCABULARY = Kind(_cut_vocabulary, _join_vocabulary)
GATE_UP = Kind(_cut_gate_up, _join_gate_up)
QKV = Kind(_cut_qkv, _join_qkv)
