"""Replicas of a model: how they share gradients and weights, and whether they do so while others are computed.

With `overlap_grad_reduce` the sums over the replicas of a bucket of gradients begin as soon as the step's last row has
given them all, under the rest of the backward pass. With `overlap_param_gather` the update leaves each replica with the
part of the weights that it has updated, and the next forward pass fetches the rest, each bucket under the layers before
it. Weights that are read outside of a forward pass are stale until then: `current_models` is the way to read them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import get_model_config

from mpo_megatron.model.provider import GroupModel, unwrap


@dataclass(frozen=True)
class DataParallel:
    """How the replicas work together.

    Attributes:
        distributed_optimizer: each replica has a part of the optimizer's state.
        overlap_grad_reduce: sum gradients while others are computed.
        overlap_param_gather: fetch updated weights while others are used; of the distributed optimizer.
        bucket_size: elements that are sent at a time, where anything overlaps; None for Megatron's choice.
    """

    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None


def wrap_data_parallel(chunks: list[Any], wanted: DataParallel) -> list[Any]:
    """Megatron's DistributedDataParallel over each model chunk; gradients of bf16 weights are summed in float32."""
    wrapped = []
    for number, chunk in enumerate(chunks):
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=chunk.config.params_dtype != torch.float64,
            use_distributed_optimizer=wanted.distributed_optimizer,
            overlap_grad_reduce=wanted.overlap_grad_reduce,
            overlap_param_gather=wanted.overlap_param_gather,
            bucket_size=wanted.bucket_size,
            # The step checks the loss before, and the gradient norm after, on all ranks alike.
            check_for_nan_in_grad=False,
        )
        # The pipeline hides what the chunks after the first send, as on the stages after the first.
        wrapped.append(DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0))
    if wanted.overlap_grad_reduce:
        # Rows before a step's last one send nothing; and all stages begin to send at the same time, since one that is
        # slowed down by it slows the others down.
        schedule = get_model_config(wrapped[0])
        many = len(wrapped) > 1
        schedule.no_sync_func = [chunk.no_sync for chunk in wrapped] if many else wrapped[0].no_sync
        schedule.grad_sync_func = (
            [chunk.start_grad_sync for chunk in wrapped] if many else wrapped[0].start_grad_sync
        )
    return wrapped


def current_models(chunks: list[Any]) -> list[GroupModel]:
    """This rank's unwrapped model chunks with the weights of the last update. All ranks call it."""
    for chunk in chunks:
        if not chunk.ddp_config.overlap_param_gather:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            if not group.param_gather_dispatched or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)
    return [unwrap(chunk) for chunk in chunks]
