"""The response head against eager log-softmax: values, gradients, and what it keeps for the backward pass."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Size:
    """Response tokens, words and the hidden size."""

    tokens: int
    vocab: int
    width: int


SMALL = Size(41, 53, 16)
N, V, H = SMALL.tokens, SMALL.vocab, SMALL.width


def head_case(
    dtype: torch.dtype, chunk: int, padded: int, size: Size = SMALL, backend: str = "eager"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and gradients of this rank's shard of the head; the hidden gradient is summed over the ranks."""
    from mpo_megatron.model.head import _TokenLogProbs, steps_of

    hidden, weight, targets, upstream = problem(dtype, size)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = padded // ranks
    first = rank * rows
    shard = weight[first : min(first + rows, size.vocab)].clone().requires_grad_()
    hidden.requires_grad_()
    logps = _TokenLogProbs.apply(
        hidden, shard, targets, first, dist.group.WORLD, chunk, len(shard), False, steps_of(backend)
    )
    logps.backward(upstream)
    assert hidden.grad is not None
    assert shard.grad is not None
    total = hidden.grad.clone()
    dist.all_reduce(total)
    return logps.detach(), total, shard.grad


def problem(
    dtype: torch.dtype, size: Size = SMALL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states [N, H], weight [V, H], targets [N], gradient of their log-probs [N])."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(size.tokens, size.width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(size.vocab, size.width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, size.vocab, (size.tokens,), generator=generator, dtype=torch.int32)
    return (
        hidden,
        weight,
        targets,
        torch.randn(size.tokens, generator=generator, dtype=torch.promote_types(dtype, torch.float32)),
    )


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_and_gradients_in_float64(world: int, chunk: int, ranks: Any) -> None:
    hidden, weight, targets, upstream = problem(torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    wanted = (hidden @ weight.t()).log_softmax(-1).gather(1, targets.long()[:, None]).squeeze(1)
    wanted.backward(upstream)
    results = ranks(world).run(head_case, torch.float64, chunk, 60)
    for logps, grad_hidden, _ in results:
        torch.testing.assert_close(logps, wanted.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([shard for *_, shard in results]), weight.grad, rtol=1e-11, atol=1e-12
    )


def test_a_rank_may_hold_padding_alone(ranks: Any) -> None:
    hidden, weight, targets, _ = problem(torch.float64)
    wanted = (hidden @ weight.t()).log_softmax(-1).gather(1, targets.long()[:, None]).squeeze(1)
    (_, _, first), (logps, _, last) = ranks(2).run(head_case, torch.float64, 7, 2 * V)
    torch.testing.assert_close(logps, wanted)
    assert (first.shape, last.shape) == ((V, H), (0, H))


@dataclass(frozen=True)
class LongResponse:
    """A response of `tokens` tokens that a model of this vocabulary and hidden size could have sampled."""

    tokens: int = 2048
    vocab: int = 2048
    width: int = 64

    def make(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden states [t, 1, H], weight [V, H], tokens), both of them in bf16.

        Logits reach 50, where bf16 has steps of 0.25.
        """
        random = torch.Generator().manual_seed(0)
        scale = (64 / self.width) ** 0.5
        hidden = torch.randn(self.tokens + 8, 1, self.width, generator=random).mul(scale).bfloat16()
        weight = torch.randn(self.vocab, self.width, generator=random).bfloat16()
        hidden, weight = hidden.to(device), weight.to(device)
        sampler = torch.Generator(device).manual_seed(0)
        chances = self.logits(hidden, weight).softmax(-1)
        return hidden, weight, torch.multinomial(chances, 1, generator=sampler)[:, 0]

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[N, V] in float64: token k is predicted from place k."""
        return hidden[: self.tokens, 0].double() @ weight.double().t()


def long_response_case(
    rounded: bool, size: LongResponse, accelerator: str = "cpu", chunk: int = 256, backend: str = "eager"
) -> dict[str, float]:
    """How far the whole head is off from float64 on the same bf16 numbers: its log-prob in nats, gradients relative.

    Args:
        rounded: with logits rounded to bf16.
        chunk: positions whose logits exist at a time.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mpo_megatron.data import TokenizedGroup
    from mpo_megatron.model import head, logits
    from mpo_megatron.runtime.device import choose_device
    from mpo_megatron.runtime.parallel import initialize
    from mpo_megatron.scheduling.pack import pack_row

    device = choose_device(accelerator)
    initialize(device)
    hidden, weight, tokens = size.make(device)
    config = TransformerConfig(
        num_layers=1, hidden_size=size.width, num_attention_heads=1, use_cpu_initialization=True
    )
    layer = ColumnParallelLinear(
        size.width, size.vocab, config=config, init_method=torch.nn.init.zeros_, bias=False
    )
    head.ResponseHead.take_over(layer, size.vocab, chunk, backend=backend)
    layer.weight = torch.nn.Parameter(weight)
    # A prompt of one token and the response: token k is predicted from place k.
    response = [tokens.cpu().numpy()]
    group = TokenizedGroup("a", np.zeros(1, dtype=int), response, np.ones(1), np.ones(1, dtype=bool))
    places = size.tokens + 8
    layer.row = pack_row([group], [[0]], row_tokens=places, shared_prompt=True, device=device)
    hidden.requires_grad_()

    def as_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left @ right).float()

    product = as_bf16 if rounded else head.full_product
    with mock.patch.object(head, "full_product", product), mock.patch.object(logits, "full_product", product):
        logp = layer(hidden)[0].sum()
        logp.backward()
    assert logp.dtype == torch.float32
    assert hidden.grad is not None

    exact, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logps = size.logits(exact, exact_weight).log_softmax(-1)
    wanted = logps.gather(1, tokens[:, None]).sum()
    right, right_weight = torch.autograd.grad(wanted, (exact, exact_weight))
    return {
        "log-prob": abs(float(logp.detach().double() - wanted.detach())),
        "d hidden": float((hidden.grad.double() - right).norm() / right.norm()),
        "d weight": float((layer.weight.grad.double() - right_weight).norm() / right_weight.norm()),
    }


@pytest.mark.parametrize("rounded", [False, True])
def test_bfloat16_weights_give_float32_logits(rounded: bool, ranks: Any) -> None:
    """Against float64 from the same bf16 numbers; logits rounded to bf16 would be off by far more than is allowed."""
    (off,) = ranks(1).run(long_response_case, rounded, LongResponse())
    assert (off["log-prob"] < 1e-3) != rounded
    # They are bf16 themselves: 8 bits.
    assert all((off[name] < 2**-8) != rounded for name in ("d hidden", "d weight"))


def test_a_processor_is_told_to_use_bf16_for_the_product_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpo_megatron.model.products import full_product

    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    left, right = torch.randn(3, 8).bfloat16(), torch.randn(8, 2100).bfloat16()
    wanted = left.double() @ right.double()
    torch.testing.assert_close(full_product(left, right).double(), wanted, rtol=1e-5, atol=1e-5)
    assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        full_product(left, right[:7])
    assert matmul.fp32_precision == before
    # As on a torch that has no such switch.
    monkeypatch.setattr(torch.backends, "mkldnn", object())
    torch.testing.assert_close(full_product(left, right).double(), wanted, rtol=1e-5, atol=1e-5)
    assert full_product(left.double(), right.double()).dtype == torch.float64
    half = full_product(left.half(), right.half())
    torch.testing.assert_close(
        half.double(), left.half().double() @ right.half().double(), rtol=1e-5, atol=1e-5
    )


def test_a_gpu_is_asked_for_float32() -> None:
    """That torch has the argument where the product asks for it: its operator for tensors without values takes it."""
    from mpo_megatron.model import products

    if not products._OUT_DTYPE:
        pytest.skip("torch >= 2.8 has the argument")
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 8), (8, 5)))
    assert torch.mm(left, right, out_dtype=torch.float32).dtype == torch.float32


def shared_gradient_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the hidden states of a row, whose prompts predict several responses: the head's, and index_add's."""
    from mpo_megatron.ragged.reads import read
    from mpo_megatron.scheduling.pack import pack_row
    from tests.helpers.models import make_groups

    groups = make_groups([3, 1, 5], 50)
    row = pack_row(groups, [range(3), [3], range(4, 9)], row_tokens=320, shared_prompt=True)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(320, 4, generator=random).to(dtype).requires_grad_()
    upstream = torch.randn(row.targets.numel(), 4, generator=random).to(dtype)
    predicting = read(hidden, row.reads)
    assert torch.equal(predicting, hidden[row.reads.places])
    predicting.backward(upstream)
    assert hidden.grad is not None
    return hidden.grad.double(), torch.zeros(320, 4).double().index_add(
        0, row.reads.places, upstream.double()
    )


def test_gradients_of_shared_hidden_states(ranks: Any) -> None:
    for dtype, places in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        ((found, wanted),) = ranks(1).run(shared_gradient_case, dtype)
        torch.testing.assert_close(found, wanted, rtol=places, atol=places / 10)


def into_main_grad_case(dtype: torch.dtype, backend: str = "eager") -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a weight's gradients after two rows and one without tokens, and what it has to be. Rows of padding
    stay as they were, and autograd is given no elements.
    """
    from mpo_megatron.model.head import _TokenLogProbs, steps_of

    hidden, weight, targets, upstream = problem(dtype)
    padded = torch.cat((weight, torch.ones(3, weight.size(1), dtype=dtype)))
    total = torch.promote_types(dtype, torch.float32)
    found, wanted = padded.clone().requires_grad_(), padded.clone().requires_grad_()
    before = torch.linspace(0, 1, padded.numel(), dtype=total).view(padded.shape)
    found.main_grad, found.grad_added_to_main_grad = before.clone(), False  # type: ignore[attr-defined]
    sums = before.clone()
    for scale, tokens in ((1.0, N), (-0.5, N), (1.0, 0)):
        for parameter, fused in ((found, True), (wanted, False)):
            parameter.grad = None
            logps = _TokenLogProbs.apply(
                (hidden[:tokens] * scale).requires_grad_(), parameter, targets[:tokens], 0, dist.group.WORLD, 8,
                len(weight), fused, steps_of(backend),
            )  # fmt: skip
            logps.backward(upstream[:tokens])
        assert found.grad is not None
        assert found.grad.is_sparse
        assert found.grad._nnz() == 0
        assert wanted.grad is not None
        sums += wanted.grad
    assert found.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert torch.equal(found.main_grad[len(weight) :], before[len(weight) :])  # type: ignore[attr-defined]
    return found.main_grad, sums  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_go_into_the_sum_of_the_step(dtype: torch.dtype, ranks: Any) -> None:
    ((found, wanted),) = ranks(1).run(into_main_grad_case, dtype)
    # Without the sum autograd's gradient is rounded to bf16.
    places = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(found, wanted, rtol=places, atol=places)
    assert (found != torch.linspace(0, 1, found.numel(), dtype=found.dtype).view(found.shape)).any()


def saved_bytes_case(backend: str = "eager") -> tuple[int, int]:
    """(bytes kept for the backward pass beside inputs, N)."""
    from mpo_megatron.model.head import _TokenLogProbs, steps_of

    hidden, weight, targets, _ = problem(torch.float32)
    hidden.requires_grad_()
    kept: dict[int, int] = {}
    inputs = {hidden.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _TokenLogProbs.apply(
            hidden, weight, targets, 0, dist.group.WORLD, 8, len(weight), True, steps_of(backend)
        )
    return sum(kept.values()), N


def test_no_logits_are_kept(ranks: Any) -> None:
    ((kept, size),) = ranks(1).run(saved_bytes_case)
    assert 0 < kept <= 16 * size
