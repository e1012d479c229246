"""Reading rows of a tensor, some of them several times, with a backward pass that gives the same in every run.

The gradient of a row that is read several times is a sum. torch's own indexing adds it up by atomic additions in
whatever order, or sorts the indices each time; here the order is that of the readings, worked out once on the host.

Shapes: t rows, N readings.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.ragged.segments import Segments, segment_sum


@dataclass(frozen=True)
class Reads:
    """Which of t rows each of N readings is of, from both sides.

    Attributes:
        places: [N] int32, the row of each reading.
        reading: [t] int32, of each row one of its readings.
        unread: [t] bool, rows without any; their `reading` is 0.
        several: [F] int32, the readings of those rows that have more than one, row after row.
        by_place: these F readings by such rows.
        shared_places: [S] int32, such rows, ascending.
    """

    places: Tensor
    reading: Tensor
    unread: Tensor
    several: Tensor
    by_place: Segments
    shared_places: Tensor

    @classmethod
    def of(cls, places: np.ndarray, rows: int) -> "Reads":
        """From the row of each reading, on the CPU."""
        places = places.astype(np.int32)
        readers = np.bincount(places, minlength=rows)
        reading = np.zeros(rows, dtype=np.int32)
        reading[places] = np.arange(len(places))
        several = np.flatnonzero(readers[places] > 1).astype(np.int32)
        several = several[np.argsort(places[several], kind="stable")]
        shared, by_place = np.unique(places[several], return_inverse=True)
        return cls(
            places=torch.from_numpy(places),
            reading=torch.from_numpy(reading),
            unread=torch.from_numpy(readers == 0),
            several=torch.from_numpy(several),
            by_place=Segments.of(by_place, len(shared)),
            shared_places=torch.from_numpy(shared),
        )


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, reads: Reads) -> Tensor:
        ctx.reads = reads
        return values.index_select(0, reads.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        reads = ctx.reads
        if not len(grad):
            return grad.new_zeros(reads.reading.numel(), *grad.shape[1:]), None
        unread = reads.unread.view(-1, *[1] * (grad.dim() - 1))
        values_grad = grad.index_select(0, reads.reading).masked_fill_(unread, 0)
        shared = grad.index_select(0, reads.several).to(torch.promote_types(grad.dtype, torch.float32))
        sums = segment_sum(shared, reads.by_place).to(grad.dtype)
        return values_grad.index_copy_(0, reads.shared_places.long(), sums), None


def read(values: Tensor, reads: Reads) -> Tensor:
    """[N, ...] the rows of `values` [t, ...] that the readings are of. Keeps nothing for the backward pass.

    The gradients of a row's readings are added up in float32 (float64 where they are), in their order.
    """
    return _Read.apply(values, reads)
