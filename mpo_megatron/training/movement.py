"""What bf16 shows of an update: foretold from the magnitudes of a sample of weights, and counted in each step."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpo_megatron.model.provider import GroupModel
from mpo_megatron.training.masters import first_place

_SIZE = 2**20  # weights of each rank in the sample, about


class WeightSample:
    """A fixed sample of a bf16 model's weights on all ranks, each of which looks at weights that it updates itself.

    Those of others may come later than an update (`overlap_param_gather`).
    """

    def __init__(self, models: Sequence[GroupModel], optimizer: Any) -> None:
        """Choose it: on this rank every so many weights of each parameter.

        Args:
            models: this rank's unwrapped model chunks.
            optimizer: Megatron's, of these models.
        """
        self._parts = [
            part
            for model in models
            for parameter in model.parameters()
            if (part := _own_part(parameter, optimizer)) is not None
        ]
        # Odd, since the width of a matrix has large powers of two: so the sample runs through its columns.
        self._stride = max(1, sum(part.numel() for part in self._parts) // _SIZE) | 1

    def values(self) -> Tensor:
        """[weights in this rank's sample] bf16, as they are now."""
        return torch.cat([part[:: self._stride] for part in self._parts])

    def moved_since(self, before: Tensor) -> float:
        """The part of the sample, over all ranks, whose bf16 values are others than `before`. Every rank calls it."""
        return _over_all_ranks(self.values() != before)

    def shown(self, update: float) -> float:
        """The part of the sample, over all ranks, that would change at an update of that size. Every rank calls it.

        It takes weights that begin on the bf16 grid, as masters made of them do.
        """
        return _over_all_ranks(shows(self.values(), update))


def _own_part(parameter: torch.nn.Parameter, optimizer: Any) -> Tensor | None:
    """The flat weights of a parameter that this rank updates; None if others update all of it."""
    weights = parameter.detach().view(-1)
    if not getattr(parameter, "main_param_sharded", False):
        return weights
    master = getattr(parameter, "main_param", None)
    if master is None:
        return None
    start = first_place(parameter, optimizer)
    return weights[start : start + master.numel()]


def shows(weights: Tensor, update: float) -> Tensor:
    """Whether an update away from zero moves a bf16 weight: not unless it reaches the middle to the next number."""
    following = (weights.view(torch.int16) + 1).view(torch.bfloat16).float()
    return (following - weights.float()).abs() <= 2 * update


def _over_all_ranks(flags: Tensor) -> float:
    """The part of the flags that are set, of all ranks together."""
    counts = torch.stack((flags.sum(), torch.tensor(flags.numel(), device=flags.device))).double()
    dist.all_reduce(counts)
    found, total = counts.tolist()
    return float(found / total)
