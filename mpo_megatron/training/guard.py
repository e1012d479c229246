"""Steps whose loss or gradient is not finite: found before the update, by all ranks alike, and left out.

bf16 and float32 have no loss scaler that would find them. Every rank adds the squared norm of its part of the summed
gradient to the sum of the metrics: what is not finite on one rank is not finite in the sum, which all ranks have, so
they decide alike. That takes one pass over the gradients, no collective and no wait of its own. Only a step that is
left out asks further: which rows, and which parameters.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpo_megatron.runtime.parallel import ParallelLayout

_SHOWN = 4  # parameters that a rank names


@dataclass
class NotFinite(Exception):
    """The step's gradients must not be used; raised on all ranks alike.

    Attributes:
        what: `loss` or `gradient`.
        value: the loss, or the norm.
        responses: numbers in the data set of the responses of rows whose loss is not finite.
        parameters: some whose gradient is not finite, where the loss is.
    """

    what: str
    value: float
    responses: list[int]
    parameters: list[str]


def squared_norm(chunks: Sequence[Any]) -> Tensor:
    """[] float64: of this rank's part of the summed gradients, on the device; to be called when they are summed.

    With the distributed optimizer a rank's part is its shard of each bucket, without all of it. Not finite where the
    sum of squares is beyond the gradients' own type too, in which Megatron takes the norm for clipping.
    """
    norms = [torch.linalg.vector_norm(part) for chunk in chunks for part in _summed(chunk)]
    return torch.stack(norms).square().sum().double()


def _summed(chunk: Any) -> Iterable[Tensor]:
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            whole = bucket.grad_data
            if buffer.ddp_config.use_distributed_optimizer:
                yield whole.chunk(group.size())[group.rank()]
            else:
                yield whole


def check_step(
    loss: float,
    squares: float,
    rows: Iterable[tuple[Tensor, Tensor]],
    chunks: Sequence[Any],
    layout: ParallelLayout,
) -> None:
    """Raise NotFinite if the step is to be left out. Every rank calls it.

    Args:
        loss: of the global step, the same on all ranks.
        squares: the sum of all ranks' `squared_norm`, the same on all ranks.
        rows: (sums of metrics, numbers of the responses) of each row of which this rank has the loss.
    """
    if math.isfinite(loss) and math.isfinite(squares):
        return
    responses: list[int] = []
    for sums, numbers in rows:
        if not sums.isfinite().all():
            responses.extend(numbers.tolist())
    found: list[Any] = [None] * layout.world_size
    dist.all_gather_object(found, (responses, _not_finite(chunks)), group=layout.control)
    by_loss = not math.isfinite(loss)
    raise NotFinite(
        what="loss" if by_loss else "gradient",
        value=loss if by_loss else math.sqrt(squares) if squares >= 0 else squares,
        responses=sorted({number for numbers, _ in found for number in numbers}),
        parameters=sorted({name for _, names in found for name in names}),
    )


def _not_finite(chunks: Sequence[Any]) -> list[str]:
    names: list[str] = []
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if len(names) < _SHOWN and gradient is not None and not gradient.isfinite().all():
                names.append(name)
    return names
