"""Megatron's data-parallel wrapper, AdamW and learning-rate schedule from the configuration."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mpo_megatron.config import OptimConfig

_DECAY_STYLES = {"CosineAnnealing": "cosine", "Linear": "linear", "Constant": "constant"}


def wrap_data_parallel(chunks: list[Any], distributed_optimizer: bool) -> list[Any]:
    """Megatron's DistributedDataParallel over each model chunk; gradients are kept and summed in float32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=False,  # the step checks the loss before, and the gradient norm after, on all ranks alike
    )
    return [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]


def build_optimizer(chunks: list[Any], optim: OptimConfig, clip: float, dtype: torch.dtype) -> Any:
    """AdamW through Megatron: (distributed) optimizer with float32 master weights where the model is bf16."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=optim.distributed,
        ),
        chunks,
    )


def build_schedule(optimizer: Any, optim: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine, linear or no decay to `min_lr` at the end of the run.

    Megatron's schedule starts at `init_lr` on the first step; with w warm-up steps it is lr / (w + 1), so
    that no step is taken at a rate of 0.
    """
    sched = optim.sched
    warmup = (
        sched.warmup_steps if sched.warmup_steps is not None else math.ceil(sched.warmup_ratio * total_steps)
    )
    warmup = min(warmup, total_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr / (warmup + 1),
        max_lr=optim.lr,
        min_lr=sched.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=_DECAY_STYLES[sched.name],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its own configuration, from the saved step on
    )
