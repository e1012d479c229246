"""The response head against eager log-softmax: values, gradients, and what it keeps for the backward pass."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

V, H, N = 53, 16, 41


def head_case(dtype: torch.dtype, chunk: int, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and gradients of this rank's shard of the head; the hidden gradient is summed over the ranks."""
    from mpo_megatron.model.head import _TokenLogProbs

    hidden, weight, targets, upstream = problem(dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = padded // size
    first = rank * rows
    shard = weight[first : min(first + rows, V)].clone().requires_grad_()
    hidden.requires_grad_()
    logps = _TokenLogProbs.apply(hidden, shard, targets, first, dist.group.WORLD, chunk)
    logps.backward(upstream)
    assert hidden.grad is not None
    assert shard.grad is not None
    total = hidden.grad.clone()
    dist.all_reduce(total)
    return logps.detach(), total, shard.grad


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    return (
        hidden,
        weight,
        targets,
        torch.randn(N, generator=generator, dtype=torch.promote_types(dtype, torch.float32)),
    )


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_and_gradients_in_float64(world: int, chunk: int, ranks: Any) -> None:
    hidden, weight, targets, upstream = problem(torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    wanted = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
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
    wanted = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (_, _, first), (logps, _, last) = ranks(2).run(head_case, torch.float64, 7, 2 * V)
    torch.testing.assert_close(logps, wanted)
    assert (first.shape, last.shape) == ((V, H), (0, H))


def test_bfloat16_is_summed_in_float32(ranks: Any) -> None:
    hidden, weight, targets, _ = problem(torch.bfloat16)
    wanted = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    ((logps, _, _),) = ranks(1).run(head_case, torch.bfloat16, 7, V)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, wanted, rtol=1e-5, atol=1e-5)


def saved_bytes_case() -> tuple[int, int]:
    """(bytes kept for the backward pass beside inputs, N)."""
    from mpo_megatron.model.head import _TokenLogProbs

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
        _TokenLogProbs.apply(hidden, weight, targets, 0, dist.group.WORLD, 8)
    return sum(kept.values()), N


def test_no_logits_are_kept(ranks: Any) -> None:
    ((kept, size),) = ranks(1).run(saved_bytes_case)
    assert 0 < kept <= 16 * size
