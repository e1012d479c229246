"""What an objective is given, what it returns, and the table of their names.

Shapes: R responses, G groups, in the row's order. All values are float32 (or float64 in tests) on one device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_megatron.errors import ConfigError


@dataclass(frozen=True)
class GroupBatch:
    """The responses of some whole groups.

    Attributes:
        policy_logps: [R] sum of log pi(y | x) over the response's tokens; carries the gradient.
        reference_logps: [R] the same under the reference policy.
        lengths: [R] response tokens.
        scores: [R] the responses' scores.
        preferred: [R] bool, the partition.
        group_index: [R] int64 in [0, G), non-decreasing.
        num_groups: G.
    """

    policy_logps: Tensor
    reference_logps: Tensor
    lengths: Tensor
    scores: Tensor
    preferred: Tensor
    group_index: Tensor
    num_groups: int


@dataclass(frozen=True)
class ObjectiveResult:
    """What an objective returns.

    Attributes:
        losses: [G] one loss a group; the caller takes the mean over the global batch.
        rewards: [R] detached implicit rewards of the responses, in the loss's own units (beta * r for MPO).
    """

    losses: Tensor
    rewards: Tensor


Objective = Callable[..., ObjectiveResult]
_OBJECTIVES: dict[str, Objective] = {}


def register(name: str) -> Callable[[Objective], Objective]:
    """Enter the decorated function `objective(batch, **hyper_parameters) -> ObjectiveResult` under `name`."""

    def enter(objective: Objective) -> Objective:
        assert name not in _OBJECTIVES, f"objective {name!r} is registered twice"
        _OBJECTIVES[name] = objective
        return objective

    return enter


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_OBJECTIVES)


def get(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    if name not in _OBJECTIVES:
        raise ConfigError(f"model.mpo.objective={name} is not known; choose one of {', '.join(names())}")
    return _OBJECTIVES[name]


def segment_mean(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[num_segments] mean of `values` [R] by `index` [R]; segments without members give 0."""
    total = values.new_zeros(num_segments).index_add(0, index, values)
    count = values.new_zeros(num_segments).index_add(0, index, torch.ones_like(values))
    return total / count.clamp(min=1)


def segment_logsumexp(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[num_segments] log of the sum of exp(`values` [R]) by `index` [R].

    The segment's maximum is subtracted first, as a constant, so that neither large values overflow nor the gradient
    (the softmax) is touched. A segment without members, or with -inf alone, gives -inf and no gradient.
    """
    peak = values.detach().new_full((num_segments,), float("-inf"))
    peak = peak.scatter_reduce(0, index, values.detach(), "amax")
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    total = values.new_zeros(num_segments).index_add(0, index, torch.exp(values - peak[index]))
    return total.log() + peak
