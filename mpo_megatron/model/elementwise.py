"""What a layer does between its products, in few passes over memory: on a CPU these cost a fifth of a step otherwise.

torch has kernels of its own for them on a GPU; on a CPU it runs one operation after another, each of which reads and
writes tensors that its cache does not hold, and keeps more of them. Here forward and backward are written out, in
place where they can be. They are the same functions, rounded once or twice less.

Shapes: T tokens, H features, F of a feed-forward layer, D head size.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers of each tensor that a core's cache holds through several operations.
_CACHED = 1 << 16


class _Normalize(torch.autograd.Function):
    """y = x / rms(x) * w, in float32 where x is narrower.

    With r = 1 / sqrt(mean(x^2) + eps) and g = dL/dy: dL/dw = sum_t g x r, dL/dx = r (g w - x r mean(g w x r)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # A view of more, as keys are, would keep all of it.
        x = x.contiguous()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        size, wide = x.size(-1), weight.to(scale.dtype)
        normal = (x * scale).view(-1, size)
        grad = grad.to(scale.dtype).reshape(-1, size)
        product = grad * normal
        grad_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = torch.mv(product, wide).div_(size)[:, None]
        grad_x = torch.mul(grad, wide, out=product).addcmul_(normal, mean, value=-1)
        return grad_x.mul_(scale.view(-1, 1)).view(x.shape).to(x.dtype), grad_weight, None


class _Gate(torch.autograd.Function):
    """silu(a) * b of x = [a, b]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=-1)
        result = torch.empty_like(a, memory_format=torch.contiguous_format)
        for part, other, out in _blocks(a, b, result):
            torch.ops.aten.silu.out(part, out=out).mul_(other)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        a, b = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_a, of_b = result.chunk(2, dim=-1)
        for part, other, out_a, out_b, g in _blocks(a, b, of_a, of_b, grad):
            torch.mul(F.silu(part), g, out=out_b)
            torch.ops.aten.silu_backward.grad_input(g * other, part, grad_input=out_a)
        return result


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors of one shape along their first dimension, of which a CPU's cache holds all."""
    first = tensors[0]
    rows = _CACHED * torch.get_num_threads() * len(first) // max(first.numel(), 1)
    return zip(*(tensor.split(max(rows, 1)) for tensor in tensors), strict=True)


class _Rotate(torch.autograd.Function):
    """[a cos - b sin, b cos + a sin] of x = [a, b]; backward by the angle's negative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (of_a, of_b) = x.chunk(2, dim=-1), result.chunk(2, dim=-1)
    torch.mul(a, cos, out=of_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=of_b).addcmul_(a, sin, value=sign)
    return result


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: [.., H] from [.., H] and [H]."""
    result: Tensor = _Normalize.apply(x, weight, eps)
    return result


def gate(x: Tensor) -> Tensor:
    """silu of the first half of the last dimension times the second: [.., F] from [.., 2 F]."""
    result: Tensor = _Gate.apply(x)
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: [t, heads, D] from the same and cos and sin [t, 1, D / 2] of its angles."""
    result: Tensor = _Rotate.apply(x, cos, sin)
    return result
