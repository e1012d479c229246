"""RMSNorm for the local layer spec, where apex and Transformer Engine are absent.

Megatron-core's own fallback refuses sequence parallelism; all that it needs is the mark on the weight that tells
Megatron to sum the weight's gradient over the tensor-parallel ranks, each of which sees a part of the sequence.

As a norm of queries or keys it sees the whole sequence, but the rank's own heads alone: there Megatron sums with and
without sequence parallelism, going by the parameter's name and the config's `qk_layernorm`.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.model.elementwise import normalize


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, Megatron's constructor signature."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        device = torch.cuda.current_device() if not config.use_cpu_initialization else "cpu"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The same of a CPU's tensors, in fewer passes over memory."""
        if x.device.type != "cpu":
            return super().forward(x)
        assert self.eps is not None
        return normalize(x, self.weight, self.eps)
