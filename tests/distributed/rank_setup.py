"""What each rank of these tests does once, before anything else."""

from typing import Any

import torch

from mpo_megatron.runtime import cpu


def set_up() -> None:
    """Send Megatron-core to the CPU, and have it compute in float64 throughout where the weights are float64.

    Its router's softmax is in float32 whatever the weights are, which is an error of some 1e-7 and no part of the
    model; tests.helpers.models.compute_in_float64 does the same to transformers.
    """
    cpu.install()
    softmax = torch.softmax

    def in_float64(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    torch.softmax = in_float64  # type: ignore[assignment]
