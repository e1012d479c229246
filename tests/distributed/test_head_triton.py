"""The response head's kernels in Triton's interpreter, on CPU ranks, against torch's operations."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import Layout, build, gradients, logps
from tests.distributed.test_head import (
    Size,
    head_case,
    into_main_grad_case,
    problem,
    saved_bytes_case,
)
from tests.helpers import interpreter
from tests.helpers.models import make_llama
from tests.helpers.ranks import RankPool, RankProcesses

# No size is a multiple of a block (64 positions, 64 words, 32 of the hidden size), nor of the words of a program.
LARGE = Size(67, 4501, 40)
ONE = Size(1, 2049, 32)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """Ranks that interpret kernels."""
    if not interpreter.is_there():
        pytest.skip("Triton is not installed; the dev extra has it on Linux")
    processes = RankProcesses(
        setup="tests.helpers.interpreter:set_up",
        teardown="megatron.core.parallel_state:destroy_model_parallel",
    )
    yield lambda world_size: RankPool(world_size, processes)
    processes.close()


def exact(dtype: torch.dtype, size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and gradients in float64 of the same numbers, from whole logits."""
    hidden, weight, targets, upstream = problem(dtype, size)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    wanted = (hidden @ weight.t()).log_softmax(-1).gather(1, targets.long()[:, None]).squeeze(1)
    grad_hidden, grad_weight = torch.autograd.grad(wanted, (hidden, weight), upstream.double())
    return wanted.detach(), grad_hidden, grad_weight


@pytest.mark.parametrize("size", [LARGE, ONE], ids=["many", "one"])
@pytest.mark.parametrize(("dtype", "places"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("world", [1, 2])
def test_values_and_gradients(world: int, dtype: torch.dtype, places: float, size: Size, ranks: Any) -> None:
    wanted, wanted_hidden, wanted_weight = exact(dtype, size)
    # Padded rows of the vocabulary take no part: the last rank's are fewer.
    results = ranks(world).run(head_case, dtype, 50, 4600, size, "triton")
    for found, grad_hidden, _ in results:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=places, atol=places)
        torch.testing.assert_close(grad_hidden.double(), wanted_hidden, rtol=places, atol=places)
    grad_weight = torch.cat([shard for *_, shard in results])
    torch.testing.assert_close(grad_weight.double(), wanted_weight, rtol=places, atol=places)


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_as_torch_does(world: int, ranks: Any) -> None:
    """Sums in float32; the gradient of a logit is rounded to bf16 in the memory of the logits, as it is elsewhere."""
    results = {
        backend: ranks(world).run(head_case, torch.bfloat16, 50, 4600, LARGE, backend)
        for backend in ("triton", "eager")
    }
    wanted, _, _ = exact(torch.bfloat16, LARGE)
    for found, eager in zip(*results.values(), strict=True):
        torch.testing.assert_close(found[0].double(), wanted, rtol=2e-6, atol=1e-5)
        for ours, other in zip(found[1:], eager[1:], strict=True):
            # A logit in thousands is rounded to the other side.
            torch.testing.assert_close(ours.double(), other.double(), rtol=2**-7, atol=2**-9)
            assert (ours != other).double().mean() < 0.01


def test_a_rank_may_hold_padding_alone(ranks: Any) -> None:
    wanted, _, _ = exact(torch.float64, ONE)
    (_, _, first), (found, _, last) = ranks(2).run(head_case, torch.float64, 7, 2 * 2049, ONE, "triton")
    torch.testing.assert_close(found, wanted)
    assert (first.shape, last.shape) == ((2049, 32), (0, 32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_go_into_the_sum_of_the_step(dtype: torch.dtype, ranks: Any) -> None:
    """Of two rows and one without tokens, with rows of padding."""
    ((found, wanted),) = ranks(1).run(into_main_grad_case, dtype, "triton")
    places = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(found, wanted, rtol=places, atol=places)


def test_no_logits_are_kept(ranks: Any) -> None:
    ((kept, size),) = ranks(1).run(saved_bytes_case, "triton")
    assert 0 < kept <= 16 * size


def batch_case(size: Size) -> None:
    """A position's log-normaliser and target's logit are the same to the last bit, whichever others there are."""
    from mpo_megatron.model import logits_triton

    hidden, weight, targets, _ = problem(torch.float32, size)
    whole = logits_triton.normalise(hidden, weight, targets, 0, 1)
    for places in (slice(0, 1), slice(30, 67)):
        part = logits_triton.normalise(hidden[places], weight, targets[places], 0, 1)
        for found, wanted in zip(part, whole, strict=True):
            assert torch.equal(found, wanted[places])


def test_the_others_of_a_row_change_nothing(ranks: Any) -> None:
    ranks(1).run(batch_case, LARGE)


def infinite_case() -> torch.Tensor:
    """[N] log-normalisers of hidden states of which the first is no number and the second is huge."""
    from mpo_megatron.model import logits_triton

    hidden, weight, targets, _ = problem(torch.float32, Size(3, 100, 16))
    hidden[0] = float("nan")
    hidden[1] *= 1e30
    return logits_triton.normalise(hidden, weight, targets, 0, 1)[0]


def test_what_is_no_number_stays_so(ranks: Any) -> None:
    """So that the step's finite check sees it."""
    (found,) = ranks(1).run(infinite_case)
    assert found[0].isnan()
    assert found[1:].isfinite().all()
    assert found[1] > 1e30


def model_case(folder: Path, layout: Layout, objective: str) -> dict[str, float]:
    """The largest difference that the head makes to log-probs and gradients of a whole model, and the largest ones."""
    from mpo_megatron.model import head
    from mpo_megatron.model.provider import unwrap

    model = build(folder, [3, 2, 4], layout)
    (inner,) = map(unwrap, model.chunks)
    assert inner.output_layer.steps is head.steps_of("triton")
    found: dict[str, list[torch.Tensor]] = {}
    for backend in ("triton", "eager"):
        inner.output_layer.steps = head.steps_of(backend)
        values = logps(model)
        gradients(model, values - 1, objective)
        found[backend] = [values, *(parameter.main_grad.clone() for parameter in inner.parameters())]
    pairs = list(zip(*found.values(), strict=True))
    return {
        "log-probs": float((pairs[0][0] - pairs[0][1]).abs().max()),
        "gradients": max(float((ours - eager).abs().max()) for ours, eager in pairs[1:]),
        "largest": min(float(eager.abs().max()) for _, eager in pairs),
    }


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_llama(folder, tie_word_embeddings=request.param == "tied", initializer_range=0.15)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_is_trained_alike(tp: int, fused: bool, model: Path, ranks: Any) -> None:
    """In float64, with the embedding's padding, tied and not, with and without gradients in the product's own sum."""
    options = {"head_backend": "triton", "fuse_weight_gradients": fused}
    layout = Layout(tp=tp, precision=torch.float64, options=options)
    for off in ranks(tp).run(model_case, model, layout, "wmpo"):
        assert off["log-probs"] < 1e-10
        assert off["gradients"] < 1e-10
        assert off["largest"] > 1e-4
