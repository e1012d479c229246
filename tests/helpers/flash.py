"""Attention of variable lengths that keeps what FlashAttention's kernel keeps, in plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _segments(
    q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return [(a.transpose(0, 1)[None], b.transpose(0, 1)[None], c.transpose(0, 1)[None]) for a, b, c in parts]


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    outputs = []
    for one, those, values in _segments(q, k, v, queries, keys):
        rows, columns = one.size(2), those.size(2)
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        out = F.scaled_dot_product_attention(one, those, values, attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class _Kept(torch.autograd.Function):
    """Saves what flash_attn.flash_attn_interface.FlashAttnVarlenFunc does: queries, keys, values, output, the
    log-normaliser of each query and head in float32, and both cumulative lengths. Scores are computed again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        ctx.lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
        out = _attend(q, k, v, *ctx.lengths)
        normaliser = torch.zeros(q.size(1), q.size(0), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normaliser, cu_q, cu_k)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        with torch.enable_grad():
            inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
            # What this keeps for itself is no part of the kernel.
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                out = _attend(*inputs, *ctx.lengths)
                grads = torch.autograd.grad(out, inputs, grad)
        return *grads, None, None


def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """A kernel for `model.attention.varlen`."""
    return _Kept.apply(q, k, v, cu_q, cu_k)
