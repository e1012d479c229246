"""The response head in bf16 against float64 from the same numbers: on a response of 2,048 tokens, and where no size is
a multiple of a block.
"""

from typing import Any

import pytest
import torch

from tests.distributed.test_head import LongResponse, Size, long_response_case, problem
from tests.gpu.conftest import Place, on_cpu, on_gpu


@pytest.mark.parametrize(
    ("place", "backend"), [on_cpu("eager"), on_gpu("eager"), on_gpu("triton")], indirect=["place"]
)
def test_head_is_precise(backend: str, place: Place, measured: Any) -> None:
    if backend == "triton":
        place.needs_library("triton")
    size = LongResponse(vocab=128_256, width=1024) if place.is_gpu else LongResponse()
    (found,) = place.ranks(1).run(
        long_response_case, False, size, place.accelerator, 1024, backend, timeout=280
    )
    measured("log-prob in nats", found["log-prob"], at_most=1e-3)
    # They are bf16 themselves: 8 bits.
    for name in ("d hidden", "d weight"):
        measured(name, found[name], at_most=2**-8)


def any_size_case(accelerator: str, backend: str, size: Size) -> dict[str, float]:
    """How far log-probs and gradients are off from float64, by norm; and log-probs of a second run from the first."""
    import torch.distributed as dist

    from mpo_megatron.model.head import _TokenLogProbs, steps_of
    from mpo_megatron.runtime.device import choose_device
    from mpo_megatron.runtime.parallel import initialize

    device = choose_device(accelerator)
    initialize(device)
    hidden, weight, targets, upstream = (tensor.to(device) for tensor in problem(torch.bfloat16, size))
    weight = weight / size.width**0.5
    exact, exact_weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logps = (exact @ exact_weight.t()).log_softmax(-1).gather(1, targets.long()[:, None]).squeeze(1)
    right_hidden, right_weight = torch.autograd.grad(logps, (exact, exact_weight), upstream.double())

    # A rank that begins in the middle of the vocabulary and has seven rows of padding.
    parameter: Any = torch.nn.Parameter(torch.cat((weight, weight[:1].expand(7, -1))))
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    hidden.requires_grad_()
    first, second = (
        _TokenLogProbs.apply(
            hidden,
            parameter,
            targets + 1000,
            1000,
            dist.group.WORLD,
            100,
            size.vocab,
            True,
            steps_of(backend),
        )
        for _ in range(2)
    )
    first.backward(upstream)
    assert hidden.grad is not None
    assert not parameter.main_grad[size.vocab :].any()
    pairs = {
        "log-probs": (first.detach(), logps.detach()),
        "d hidden": (hidden.grad, right_hidden),
        "d weight": (parameter.main_grad[: size.vocab], right_weight),
    }
    off = {
        name: float((found.double() - right).norm() / right.norm()) for name, (found, right) in pairs.items()
    }
    return {**off, "second run": float((second - first).detach().abs().max())}


SIZES = (Size(1, 2049, 64), Size(131, 4501, 200), Size(3001, 50_257, 768))


@pytest.mark.parametrize(
    ("place", "backend", "size"),
    [
        *(on_cpu("eager", size) for size in SIZES[:2]),
        *(on_gpu(backend, size) for backend in ("eager", "triton") for size in SIZES),
    ],
    indirect=["place"],
)
def test_any_size(size: Size, backend: str, place: Place, measured: Any) -> None:
    if backend == "triton":
        place.needs_library("triton")
    (found,) = place.ranks(1).run(any_size_case, place.accelerator, backend, size, timeout=280)
    measured("log-probs", found["log-probs"], at_most=1e-6)
    # Of numbers that are bf16, or sums of such.
    measured("d hidden", found["d hidden"], at_most=2**-8)
    measured("d weight", found["d weight"], at_most=2**-8)
    measured("second run", found["second run"], at_most=0.0)
