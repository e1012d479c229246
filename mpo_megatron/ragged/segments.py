"""Members of segments, such as the responses of groups, and arithmetic by segment.

Sums are exact in this sense: those of a segment are added up one after the other, in the order of its members, whatever
else is in the batch. So equal members have equal sums to the last bit, on a CPU and on a GPU, in every run; no atomic
addition decides their order, as it would in `index_add`. The same holds for gradients: a sum's gradient is spread over
its members, and that of spread values is a sum.

Nothing here makes the host wait for the device: sizes are known to the host, and there is neither indexing by a mask
nor `torch.where` with a number, which is copied to the device.

Values are float32 or float64 [M]; `where` [M] bool leaves members out, whatever they are. A segment may be empty.

Shapes: M members, S segments.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which of S segments each of M members is in.

    Attributes:
        segment: [M] int32 in [0, S).
        offsets: [S + 1] int32: with the members one segment after the other, those of segment s are from [s] up to
            [s + 1].
        order: [M] int32, the members in that order; None where they are in it.
    """

    segment: Tensor
    offsets: Tensor
    order: Tensor | None = None

    @classmethod
    def of(cls, segment: ArrayLike, num_segments: int) -> "Segments":
        """From the segment of each member, on the CPU."""
        segment = np.asarray(segment, dtype=np.int32)
        offsets = np.zeros(num_segments + 1, dtype=np.int32)
        np.cumsum(np.bincount(segment, minlength=num_segments), out=offsets[1:])
        order = None
        if (np.diff(segment) < 0).any():
            order = torch.from_numpy(np.argsort(segment, kind="stable").astype(np.int32))
        return cls(torch.from_numpy(segment), torch.from_numpy(offsets), order)

    @property
    def count(self) -> int:
        """S."""
        return self.offsets.numel() - 1

    @property
    def sizes(self) -> Tensor:
        """[S] int32 members of each segment."""
        return self.offsets.diff()


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return values.index_select(0, segments.segment)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return segment_sum(grad, ctx.segments), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return _reduce(values, segments, "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return spread(grad, ctx.segments), None


def _reduce(values: Tensor, segments: Segments, kind: str) -> Tensor:
    if segments.order is not None:
        values = values.index_select(0, segments.order)
    # As a column: one thread then goes through a segment from its first member to its last. For one dimension torch
    # takes a kernel on a GPU whose order depends on where in memory the segment begins.
    columns = values[:, None] if values.dim() == 1 else values
    reduced = torch.segment_reduce(columns, kind, offsets=segments.offsets, axis=0, unsafe=True)
    return reduced.squeeze(1) if values.dim() == 1 else reduced


def spread(values: Tensor, segments: Segments) -> Tensor:
    """[M] of each member its segment's value, from `values` [S] of any type."""
    return _Spread.apply(values, segments)


def segment_sum(values: Tensor, segments: Segments, where: Tensor | None = None) -> Tensor:
    """[S] sum of `values` [M]; further dimensions of both are summed each on its own."""
    return _Sum.apply(values if where is None else values.masked_fill(~where, 0), segments)


def segment_mean(values: Tensor, segments: Segments, where: Tensor | None = None) -> Tensor:
    """[S] mean of `values`; segments without members give 0."""
    count = segments.sizes if where is None else segment_sum(where.to(values.dtype), segments)
    return segment_sum(values, segments, where) / count.clamp(min=1)


def segment_max(values: Tensor, segments: Segments, where: Tensor | None = None) -> Tensor:
    """[S] largest of `values`, without gradient; segments without members give -inf."""
    values = values.detach()
    return _reduce(values if where is None else values.masked_fill(~where, -torch.inf), segments, "max")


def segment_any(flags: Tensor, segments: Segments) -> Tensor:
    """[S] bool: whether a member has its flag [M] set."""
    return segment_max(flags.float(), segments) > 0


def segment_logsumexp(values: Tensor, segments: Segments, where: Tensor | None = None) -> Tensor:
    """[S] log of the sum of exp(`values`).

    The segment's maximum is subtracted first, as a constant, so that neither large values overflow nor the gradient
    (the softmax) is touched. A segment without members, or with -inf alone, gives -inf and no gradient.
    """
    if where is not None:
        values = values.masked_fill(~where, -torch.inf)
    peak = segment_max(values, segments)
    peak = peak.masked_fill(~peak.isfinite(), 0)
    total = segment_sum(torch.exp(values - spread(peak, segments)), segments)
    # The logarithm of 0 has no gradient that could be multiplied with 0.
    nothing = total == 0
    return (total.masked_fill(nothing, 1).log() + peak).masked_fill(nothing, -torch.inf)


def segment_log_softmax(values: Tensor, segments: Segments) -> Tensor:
    """[M] `values` minus the log-sum-exp of their segment."""
    return values - spread(segment_logsumexp(values, segments), segments)


def first_highest(values: Tensor, segments: Segments) -> Tensor:
    """[M] bool: the highest value of its segment, of several the first."""
    highest = values == spread(segment_max(values, segments), segments)
    # Exact in float32 up to 2^24 members.
    place = torch.arange(len(values), device=values.device, dtype=values.dtype)
    return place == -spread(segment_max(-place, segments, highest), segments)


def above_mean(values: Tensor, segments: Segments, where: Tensor | None = None) -> Tensor:
    """[M] bool: above the segment's mean by more than the mean's rounding can explain.

    The rule of `mpo_megatron.data.partition`: 2n units in the last place of the segment's largest magnitude, so that
    equal scores such as 0.1, 0.1, 0.1 have none above, however their mean is rounded. Of members that `where` leaves
    out it says nothing.
    """
    count = segments.sizes if where is None else segment_sum(where.to(values.dtype), segments)
    slack = 2 * count * torch.finfo(values.dtype).eps * segment_max(values.abs(), segments, where)
    return values - spread(segment_mean(values, segments, where), segments) > spread(slack, segments)
