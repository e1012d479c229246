"""Transformer Engine's compiled operations in torch: products, norms, rotary embedding, sequences, optimizer steps.

Names, arguments and results are those of `transformer_engine_torch`. Sums are in float32 or, where the inputs are
float64, in that.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.helpers.transformer_engine.dtypes import TORCH, DType
from tests.helpers.transformer_engine.float8 import plain, quantize

__all__ = [
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "fused_rope_backward",
    "fused_rope_forward",
    "generic_gemm",
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "swap_first_dims",
]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def generic_gemm(
    a: Any, transpose_a: bool, b: Any, transpose_b: bool, out: Tensor | None, quantizer: Any, out_dtype: Any,
    bias: Tensor | None, bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, **others: Any,
) -> tuple[Any, Tensor | None, None, None]:  # fmt: skip
    """The product op(b) @ op(a) of matrices whose leading dimensions are flattened; cuBLAS counts columns first.

    Returns:
        (product, gradient of the bias where `grad` and a bias ask for it, None, None).
    """
    assert not gelu, "no fused activation"
    assert others.get("alpha", 1.0) == 1.0
    # Blocks of 8-bit operands run along what the product sums over.
    left, right = plain(b, by_columns=transpose_b), plain(a, by_columns=not transpose_a)
    rows, columns = left.flatten(0, -2), right.flatten(0, -2)
    common = torch.promote_types(rows.dtype, columns.dtype)
    product = (rows.t() if transpose_b else rows).to(common) @ (columns.t() if transpose_a else columns).to(
        common
    )
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = rows.sum(0)
    elif bias is not None:
        product = product + bias
    if out is not None:
        if accumulate:
            out.add_(product.to(out.dtype))
        else:
            out.copy_(product)
        return out, bias_gradient, None, None
    if not transpose_b:
        product = product.view(*left.shape[:-1], -1)
    if out_dtype is not None:
        product = product.to(TORCH[DType(int(out_dtype))])
    return (product if quantizer is None else quantize(product, quantizer)), bias_gradient, None, None


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """(weight * x / root mean square of x [N, H] over H, None, reciprocal root mean squares [N])."""
    wide = _wide(x)
    reciprocal = torch.rsqrt(wide.square().mean(-1) + epsilon)
    gain = weight.to(wide.dtype) + zero_centered
    normed = (wide * reciprocal[:, None] * gain).to(TORCH[DType(int(dtype))])
    if quantizer is not None:
        return quantize(normed, quantizer, out), None, reciprocal
    return (normed if out is None else out.copy_(normed)), None, reciprocal


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, weight)."""
    wide, outer = _wide(x), _wide(gradient)
    unit = wide * reciprocal[:, None]
    inner = outer * (weight.to(wide.dtype) + zero_centered)
    along = (inner * unit).mean(-1, keepdim=True)
    of_x = reciprocal[:, None] * (inner - unit * along)
    return of_x.to(x.dtype), (outer * unit).sum(0).to(weight.dtype)


def _rotate(t: Tensor, angles: Tensor, direction: int) -> Tensor:
    """Turn pairs (i, i + D/2) of the first D numbers of each head of t [S, B, heads, head size] by angles [S, 1, 1, D].

    The angle of a token is that of its place in the sequence, as the kernel has it.
    """
    size = angles.shape[-1]
    angles = angles[: t.shape[0]]
    turned, rest = _wide(t[..., :size]), t[..., size:]
    first, second = turned.chunk(2, -1)
    quarter = torch.cat((-second, first), -1)
    turned = turned * angles.cos() + direction * quarter * angles.sin()
    return torch.cat((turned.to(t.dtype), rest), -1)


def fused_rope_forward(
    t: Tensor,
    angles: Tensor,
    starts: Any,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Any,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    assert not interleaved
    assert starts is None
    assert cu_seqlens is None
    assert cp_size == 1
    return _rotate(t, angles, 1)


def fused_rope_backward(
    t: Tensor,
    angles: Tensor,
    starts: Any,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Any,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    return _rotate(t, angles, -1)


def convert_thd_to_bshd(tokens: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    """Sequences one after another [T, heads, D] as a padded batch [B, S, heads, D]."""
    out = tokens.new_zeros(batch, longest, *tokens.shape[1:])
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        out[i, : stop - start] = tokens[start:stop]
    return out


def convert_bshd_to_thd(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """The reverse of `convert_thd_to_bshd`."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([sequence[:length] for sequence, length in zip(padded, lengths, strict=True)])


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def multi_tensor_l2norm(
    chunk: int, overflow: Any, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm of all tensors together, the norm of each)."""
    each = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return each.norm(), each


def multi_tensor_scale(chunk: int, overflow: Any, lists: Sequence[Sequence[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(
    chunk: int, overflow: Any, lists: Sequence[Sequence[Tensor]], scale: Tensor
) -> None:
    """`multi_tensor_scale` with a factor that is on the device: what Megatron-core 0.19 clips with."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int, overflow: Any, lists: Sequence[Sequence[Tensor]], lr: float, beta1: float, beta2: float,
    epsilon: float, step: int, mode: int, bias_correction: bool, weight_decay: float,
) -> None:  # fmt: skip
    """A step of Adam (`mode` 0) or AdamW (1) on lists of (gradients, parameters, first moments, second moments)."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        g = gradient.float()
        if mode == 0:
            g = g + weight_decay * parameter.float()
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (mean / first) / ((square / second).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * parameter.float()
        parameter.sub_((lr * update).to(parameter.dtype))
