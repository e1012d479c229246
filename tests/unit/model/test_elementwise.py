"""The written-out operations against torch's own, with their gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.model.elementwise import gate, normalize, rotate

Function = Callable[..., Tensor]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)


def _both(ours: Function, theirs: Function, *inputs: Tensor) -> list[list[Tensor]]:
    """Values and gradients of each."""
    found = []
    for function in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        value = function(*leaves)
        torch.manual_seed(1)
        found.append([value.detach(), *torch.autograd.grad(value, leaves, torch.randn_like(value))])
    return found


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_they_are_torchs(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    angles = torch.randn(5, 1, 4, dtype=dtype)

    def norm(size: int) -> Function:
        return lambda x, w: F.rms_norm(x, (size,), w, 1e-3)

    cases: list[tuple[Function, Function, list[Tensor]]] = [
        (lambda x, w: normalize(x, w, 1e-3), norm(12), [torch.randn(5, 1, 12), torch.randn(12)]),
        (lambda x, w: normalize(x, w, 1e-3), norm(4), [torch.randn(5, 1, 3, 4), torch.randn(4)]),
        (gate, lambda x: F.silu(x[..., :6]) * x[..., 6:], [torch.randn(5, 1, 12)]),
        (gate, lambda x: F.silu(x[..., :6]) * x[..., 6:], [torch.randn(0, 1, 12)]),
        # More than is gone through at a time.
        (gate, lambda x: F.silu(x[..., :200]) * x[..., 200:], [torch.randn(1700, 1, 400)]),
        (
            lambda x: rotate(x, angles.cos(), angles.sin()),
            lambda x: _turned(x, angles.cos(), angles.sin()),
            [torch.randn(5, 3, 8)],
        ),
    ]
    for ours, theirs, inputs in cases:
        for mine, other in zip(*_both(ours, theirs, *(tensor.to(dtype) for tensor in inputs)), strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_a_norm_of_a_slice_that_is_not_contiguous() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 1, 2, 12, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    (mine, *gradients), (other, *others) = _both(
        lambda x, w: normalize(x[..., 4:8], w, 1e-3),
        lambda x, w: F.rms_norm(x[..., 4:8], (4,), w, 1e-3),
        x,
        weight,
    )
    for a, b in zip([mine, *gradients], [other, *others], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
