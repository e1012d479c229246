"""Hyper-parameters for every objective, and batches of groups by hand."""

from collections.abc import Sequence
from typing import Any

import torch

from mpo_megatron.objectives import GroupBatch, ObjectiveResult, get
from mpo_megatron.ragged.groups import GroupIndex

F64 = torch.float64

# For each registered objective: what it needs, and values at which none of its terms vanishes.
SETTINGS: dict[str, dict[str, Any]] = {
    "mpo": {"beta": 0.1},
    "wmpo": {"beta": 0.1, "alpha": 0.3},
    "mpo_reference_free": {"beta": 2.0, "gamma": 0.5},
    "softmax_dpo": {"beta": 0.1},
    "dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "dpo_best_random": {"beta": 0.1},
    "dpo_all_pairs": {"beta": 0.1},
    "dpo_cross_pairs": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "ipo": {"beta": 0.1},
    "r_dpo": {"beta": 0.1, "alpha": 0.02},
    "orpo": {"beta": 0.1},
    "plackett_luce": {"beta": 0.1},
    "ordered_bins": {"beta": 0.1, "k": 3},
    "infonca": {"beta": 0.1, "alpha": 0.5},
    "nca": {"beta": 0.1, "alpha": 0.5},
    "rpo": {"beta": 0.1, "eta": 0.7},
    "kto": {"beta": 0.1, "undesirable_weight": 1.5},
    "sppo": {"beta": 0.2},
    "grpo_offline": {"length_normalised": True},
    "sft": {},
}


def batch_of(
    scores: Sequence[Sequence[float]],
    log_ratios: Sequence[Sequence[float]],
    *,
    lengths: Sequence[Sequence[int]] | None = None,
    reference: float = 0.0,
    dtype: torch.dtype = F64,
) -> GroupBatch:
    """Groups with these scores and log-ratios to a reference of which every log-prob is `reference`; lengths of 1."""

    def flat(values: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([value for group in values for value in group], dtype=dtype)

    sizes = [len(group) for group in scores]
    preferred = [[score > sum(group) / len(group) for score in group] for group in scores]
    ratios = flat(log_ratios)
    return GroupBatch(
        policy_logps=(ratios + reference).requires_grad_(),
        reference_logps=torch.full_like(ratios, reference),
        lengths=flat(lengths or [[1] * size for size in sizes]).long(),
        scores=flat(scores),
        preferred=flat(preferred).bool(),
        response_ids=torch.arange(sum(sizes)),
        index=GroupIndex.of(sizes),
    )


def run(name: str, batch: GroupBatch, **settings: Any) -> ObjectiveResult:
    """The objective with its `SETTINGS`, or with others."""
    return get(name)(batch, **(settings or SETTINGS[name]))


def loss_and_gradient(name: str, batch: GroupBatch, **settings: Any) -> tuple[list[float], torch.Tensor]:
    """([G] losses, [R] gradient of their sum by the policy's log-probs)."""
    losses = run(name, batch, **settings).losses
    (gradient,) = torch.autograd.grad(losses.sum(), batch.policy_logps)
    return losses.tolist(), gradient


def random_batch(
    sizes: Sequence[int] = (2, 5, 3, 8, 2), *, seed: int = 0, dtype: torch.dtype = F64
) -> GroupBatch:
    """Ragged groups; log-probs of some nats a token, distinct scores."""
    random = torch.Generator().manual_seed(seed)
    groups = [torch.randn(size, generator=random, dtype=F64).tolist() for size in sizes]
    lengths = [torch.randint(2, 30, (size,), generator=random).tolist() for size in sizes]
    ratios = [(3 * torch.randn(size, generator=random, dtype=F64)).tolist() for size in sizes]
    return batch_of(groups, ratios, lengths=lengths, reference=-40.0, dtype=dtype)
