"""A row's keys and values over the context-parallel ranks: gathered for each layer, and again for its backward pass.

Kept, they would be as many times a rank's own as there are ranks. Gathering them again costs the same transfer once
more, as in Transformer Engine's context parallelism by all-gather.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from mpo_megatron.model.copies import Copies, Make
from mpo_megatron.scheduling.layout import context_spans


def gather_row(
    keys: Tensor, values: Tensor, row_tokens: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Keys and values [T, Hkv, D] in the row's order from those of the tokens [t, Hkv, D] that each rank holds.

    One collective for both; its backward pass sums the gradients over the ranks and gives each its own tokens' part.
    """
    return _split(_gather(torch.cat((keys, values), dim=1), row_tokens, group))


def _gather(held: Tensor, row_tokens: int, group: dist.ProcessGroup) -> Tensor:
    gathered = tensor_parallel.gather_from_sequence_parallel_region(
        held, tensor_parallel_output_grad=True, group=group
    )
    size = dist.get_world_size(group)
    spans = [span for rank in range(size) for span in context_spans(row_tokens, size, rank)]
    chunks = gathered.split([span.length for span in spans])
    return torch.cat([chunks[i] for i in sorted(range(len(spans)), key=lambda i: spans[i].start)])


def _split(keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = keys_and_values.chunk(2, dim=1)
    return keys, values


class ContextKeys:
    """One layer's keys and values of a row, which its backward pass gathers again.

    Every rank of the group uses one for the same layers in the same order, and calls `before_backward`.
    """

    def __init__(self, row_tokens: int, group: dist.ProcessGroup) -> None:
        self._row_tokens, self._group = row_tokens, group
        self._copies = Copies()
        self._held: Make | None = None
        self._again: tuple[Tensor, ...] = ()  # between the two nodes of the backward pass, below

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `gather_row`; operations within `not_kept` will keep neither result."""
        held = torch.cat((keys, values), dim=1)
        self._held = self._copies.keep(held)
        # In the backward pass the node that follows all that ask for keys and values.
        whole = _Forget.apply(_gather(held, self._row_tokens, self._group), self)
        keys, values = _split(whole)
        return self._copies.add(keys, lambda: self._again[0]), self._copies.add(
            values, lambda: self._again[1]
        )

    def not_kept(self) -> contextlib.AbstractContextManager[None]:
        return self._copies.not_kept()

    def before_backward(self, output: Tensor) -> Tensor:
        """`output` itself. What made it finds keys and values in its backward pass, on every rank of the group."""
        return _GatherAgain.apply(output, self)

    def gather_again(self) -> None:
        assert self._held is not None
        with torch.no_grad():
            self._again = _split(_gather(self._held(), self._row_tokens, self._group))

    def forget(self) -> None:
        self._again = ()


class _GatherAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, keys: ContextKeys) -> Tensor:
        ctx.keys = keys
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.keys.gather_again()
        return grad, None


class _Forget(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, keys: ContextKeys) -> Tensor:
        ctx.keys = keys
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.keys.forget()
        return grad, None
