"""Process group and parallel layout: who this rank is, handed on explicitly.

Megatron-core keeps its groups in `parallel_state`; code here reads them through one frozen record, so that a function's
needs show in its arguments.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.runtime.meeting import find_store, meet

_LATEST_TO_LEAVE = datetime.timedelta(seconds=20)


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions and this rank's place in each.

    `tp` tensor, `pp` pipeline, `cp` context, `dp` data parallel; `vpp` is the number of model chunks a
    pipeline rank holds. `ep` expert parallel: the experts of a layer are spread over that many of its cp * dp ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    ep: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    ep_rank: int
    device: torch.device
    # Over Gloo, of all ranks: for what may wait long on one of them. None: the default group.
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the response head."""
        return self.pp_rank == self.pp - 1

    @property
    def speaks_for_replica(self) -> bool:
        """One rank a data-parallel replica that holds its log-probs: the contributor to sums over the world."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    def __str__(self) -> str:
        named = zip(("TP", "PP", "VPP", "CP", "DP", "EP"), self.sizes, strict=True)
        sizes = [f"{name} {size}" for name, size in named if size > 1]
        return f"{self.world_size} rank{'s' * (self.world_size > 1)} ({', '.join(sizes) or 'no parallelism'})"

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """(tp, pp, vpp, cp, dp, ep)."""
        return self.tp, self.pp, self.vpp, self.cp, self.dp, self.ep


def check_tasks(environment: Mapping[str, str]) -> None:
    """Raise ConfigError for one of several Slurm tasks that nobody has made a rank: each would train alone."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" not in environment and tasks > 1:
        raise ConfigError(
            f"srun has started {tasks} tasks without torchrun, and each would train for itself; start one torchrun a "
            "node, as examples/slurm.sh does"
        )


def check_world(world_size: int, tp: int, pp: int, cp: int, ep: int) -> None:
    """Raise ConfigError unless `tp * pp * cp` divides the number of ranks, and `ep` its context times data part."""
    model = tp * pp * cp
    if world_size % model:
        raise ConfigError(
            f"{world_size} rank{'s' * (world_size > 1)} cannot be cut into models of tensor {tp} x pipeline {pp} "
            f"x context {cp} = {model} ranks; start a multiple of {model} (torchrun --nproc-per-node), "
            "or change the sizes"
        )
    replicas = world_size // (tp * pp)
    if replicas % ep:
        fitting = [n for n in range(1, replicas + 1) if not replicas % n]
        raise ConfigError(
            f"model.expert_model_parallel_size={ep} does not divide the {replicas} rank{'s' * (replicas > 1)} of "
            f"context x data parallelism ({world_size} / tensor {tp} / pipeline {pp}), which share a layer's experts; "
            f"use one of {', '.join(map(str, fitting))}, or start more ranks (torchrun --nproc-per-node)"
        )


def initialize(
    device: torch.device,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    cp: int = 1,
    ep: int = 1,
    timeout_minutes: int = 30,
    control_timeout_minutes: int = 24 * 60,
) -> ParallelLayout:
    """Start torch.distributed (as torchrun says, or one process alone) and Megatron's groups.

    Args:
        timeout_minutes: after which a collective counts as hung.
        control_timeout_minutes: the same where ranks wait for one that reads, tokenises or writes.

    Raises:
        ConfigError: the number of ranks is not a multiple of tp * pp * cp or of tp * pp * ep, some ranks have a GPU
            and others none, or Slurm's tasks are no ranks.
    """
    from megatron.core import parallel_state

    check_tasks(os.environ)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0" if os.environ["WORLD_SIZE"] == "1" else "29500"
    check_world(int(os.environ["WORLD_SIZE"]), tp, pp, cp, ep)
    if not dist.is_initialized():
        _start(device, datetime.timedelta(minutes=timeout_minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        distributed_timeout_minutes=timeout_minutes,
    )
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=control_timeout_minutes))
    return replace(current_layout(device), control=control)


def _start(device: torch.device, timeout: datetime.timedelta) -> None:
    """Find the other ranks, agree with them on the device, and start the default group on it."""
    store, rank, world_size = find_store(timeout)
    meet(device, store, rank, world_size)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("default", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )


def current_layout(device: torch.device) -> ParallelLayout:
    """This rank's place in the groups that Megatron has, whoever has made them."""
    from megatron.core import parallel_state

    return ParallelLayout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        cp=parallel_state.get_context_parallel_world_size(),
        dp=parallel_state.get_data_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        device=device,
    )


def raise_together(error: UserError | None, layout: ParallelLayout) -> None:
    """Raise the first rank's error on every rank, so that none waits for one that has stopped. All ranks call it."""
    errors: list[UserError | None] = [None] * layout.world_size
    dist.all_gather_object(errors, error, group=layout.control)
    for raised in errors:
        if raised is not None:
            raise raised


@contextmanager
def raising_together(layout: ParallelLayout) -> Iterator[None]:
    """Run a block that may stop at a UserError on some ranks, and raise it on every rank. All ranks enter it."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    raise_together(error, layout)


def shutdown() -> None:
    """End Megatron's groups and torch.distributed; safe to call when neither was started.

    A rank whose part of the last collective is done waits for the others to come here: they may still be receiving, and
    would take its closed connection for an error. Of ranks that do not come, it waits for some seconds.
    """
    from megatron.core import parallel_state

    if dist.is_initialized():
        store = _get_default_store()
        # Who keeps the store may have left, and then all have come.
        with contextlib.suppress(dist.DistError):
            store.set(f"leaving/{dist.get_rank()}", "1")
            store.wait([f"leaving/{rank}" for rank in range(dist.get_world_size())], _LATEST_TO_LEAVE)
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
