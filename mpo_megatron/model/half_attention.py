"""Attention in bf16 on a CPU whose backward pass is computed in float32.

torch's own kernel takes a multiple of float32's time for the backward pass of a segment of some hundred tokens: 4.0
against 1.7 ms with the casts, at 110 queries of 9 heads and 214 keys of 3 (torch 2.13, one core with AMX). In float32
gradients are also closer to the exact ones, as nothing is rounded to bf16 between the products. The forward pass is
torch's, to the last bit.
"""

from typing import Any

import torch
from torch import Tensor

from mpo_megatron.runtime.capabilities import version_numbers

_ATEN = torch.ops.aten
# Before, the kernels took as many heads of keys as of queries (pytorch/pytorch#157893).
_GROUPED = version_numbers(torch.__version__) >= (2, 9)


def half_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """[1, Hq, queries, D] from q [1, Hq, queries, D] and k, v [1, Hkv, keys, D], of one type.

    Args:
        mask: [queries, keys] what is added to scores; None: causal, of as many queries as keys.
    """
    out: Tensor = _Attention.apply(q, k, v, mask, scale)
    return out


def has_half_attention(q: Tensor, k: Tensor) -> bool:
    """Whether these are what it is for."""
    half = q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled()
    return half and (_GROUPED or q.size(-2) == k.size(-2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        out, normalizers = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, normalizers, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, normalizers, mask = ctx.saved_tensors
        whole = [tensor.float() for tensor in (grad, q, k, v, out)]
        grads = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *whole,
            normalizers,
            0.0,
            mask is None,
            attn_mask=None if mask is None else mask.float(),
            scale=ctx.scale,
        )
        return (*(found.to(q.dtype) for found in grads), None, None)
