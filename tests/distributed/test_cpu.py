"""Megatron-core on the CPU: what asks for CUDA by name gets the CPU, also inside a backward pass."""

from typing import Any

import torch
from torch import Tensor


class Doubled(torch.autograd.Function):
    """2 x, whose backward pass runs one of its own, on tensors that it makes on the GPU by name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().to(device="cuda").requires_grad_()
            twice = torch.full_like(x, 2.0, device="cuda") * x
        torch.autograd.backward(twice, gradients[0])
        assert x.grad is not None
        return x.grad


def gradient() -> list[float]:
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    Doubled.apply(x).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def test_backward_passes_ask_for_cuda_too(ranks: Any) -> None:
    assert ranks(1).run(gradient) == [[2.0, 2.0]]
