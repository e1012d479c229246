"""Arithmetic by segment: on values [R] of which each belongs to one of S segments, such as the groups of a batch.

No loop over segments, no padding; any float type. `index` is int64 [R] in [0, S); `group_index` is non-decreasing too.
A segment may be empty.

Shapes: R responses, S segments, G groups, P pairs of responses.
"""

import torch
from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[S] sum of `values` [R] by `index`."""
    return values.new_zeros(num_segments).index_add(0, index, values)


def segment_size(index: Tensor, num_segments: int) -> Tensor:
    """[S] int64: members of each segment."""
    return segment_sum(torch.ones_like(index), index, num_segments)


def segment_mean(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[S] mean of `values` [R] by `index`; segments without members give 0."""
    return segment_sum(values, index, num_segments) / segment_size(index, num_segments).clamp(min=1)


def segment_max(values: Tensor, index: Tensor, num_segments: int, empty: float) -> Tensor:
    """[S] largest of `values` [R] by `index`, without gradient; segments without members give `empty`."""
    start = values.detach().new_full((num_segments,), empty)
    return start.scatter_reduce(0, index, values.detach(), "amax", include_self=False)


def segment_any(flags: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[S] bool: whether a member has its flag [R] set."""
    return segment_sum(flags.long(), index, num_segments) > 0


def segment_logsumexp(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[S] log of the sum of exp(`values` [R]) by `index`.

    The segment's maximum is subtracted first, as a constant, so that neither large values overflow nor the gradient
    (the softmax) is touched. A segment without members, or with -inf alone, gives -inf and no gradient.
    """
    peak = segment_max(values, index, num_segments, float("-inf"))
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    return segment_sum(torch.exp(values - peak[index]), index, num_segments).log() + peak


def segment_log_softmax(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[R] `values` minus the log-sum-exp of their segment."""
    return values - segment_logsumexp(values, index, num_segments)[index]


def first_highest(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[S] place in [0, R) of each segment's highest value, the first of several; segments must not be empty."""
    highest = segment_max(values, index, num_segments, 0)[index] == values
    places = torch.arange(values.numel(), device=values.device)
    start = places.new_zeros(num_segments)
    return start.scatter_reduce(0, index[highest], places[highest], "amin", include_self=False)


def above_mean(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """[R] bool: above the segment's mean by more than the mean's rounding can explain.

    The rule of `mpo_megatron.data.partition`: 2n units in the last place of the segment's largest magnitude, so that
    equal scores such as 0.1, 0.1, 0.1 have none above, however their mean is rounded.
    """
    largest = segment_max(values.abs(), index, num_segments, 0)
    slack = 2 * segment_size(index, num_segments) * torch.finfo(values.dtype).eps * largest
    return values - segment_mean(values, index, num_segments)[index] > slack[index]


def group_starts(group_index: Tensor, num_groups: int) -> Tensor:
    """[G] place of each group's first member."""
    size = segment_size(group_index, num_groups)
    return size.cumsum(0) - size


def group_pairs(group_index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """All ordered pairs of members of one group, each member with itself included: two int64 [P], P = sum of n^2."""
    # [R], of each member's group.
    size = segment_size(group_index, num_groups)[group_index]
    first = torch.repeat_interleave(size)
    place = torch.arange(first.numel(), device=first.device) - (size.cumsum(0) - size)[first]
    return first, group_starts(group_index, num_groups)[group_index[first]] + place
