"""Write the trained model as a Hugging Face folder, parameter by parameter, from any layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mpo_megatron.conversion.load import global_parameter_names
from mpo_megatron.conversion.names import entries
from mpo_megatron.conversion.transforms import Cut
from mpo_megatron.conversion.weight_writer import MAX_SHARD_BYTES, write_folder
from mpo_megatron.errors import CheckpointError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.runtime.parallel import ParallelLayout, raise_together


def export_hf(
    models: Sequence[GroupModel],
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    source: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    values: Callable[[torch.nn.Parameter], Tensor] = torch.Tensor.detach,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config, tokenizer and weights to `output`; all ranks call it, rank 0 writes.

    The vocabulary's padding is left out; tied weights are written once. The folder appears under its name when it is
    complete, in the place of an older one.

    Args:
        models: this rank's unwrapped model chunks.
        source: the Hugging Face folder that the run started from, for everything but the weights.
        output: the folder to make.
        dtype: of the weights; None: as the model was trained.
        values: a parameter's values, in its shape; called by all ranks that hold the parameter, in the same order.

    Raises:
        CheckpointError: the folder cannot be written; on all ranks.
    """
    parameters = {
        name: parameter for model in models for name, parameter in global_parameter_names(model).items()
    }
    holdings = _holdings(parameters, layout)
    dtype = dtype or next(iter(parameters.values())).dtype
    tensors = _gathered(architecture, parameters, holdings, layout, dtype, values)
    error = None
    if layout.is_main:
        table = entries(architecture)
        shapes = {name: shape for entry in table for name, shape in entry.shapes(architecture).items()}
        try:
            write_folder(Path(output), Path(source), shapes, dtype, tensors, max_shard_bytes)
        except CheckpointError as caught:
            error = caught
    for _ in tensors:  # the other ranks, and rank 0 after an error: gathering takes all of them
        pass
    raise_together(error, layout)


@dataclass(frozen=True)
class _Holding:
    """Where a parameter is: the first rank that holds a shard of it, and the shape of each shard."""

    rank: int
    shape: torch.Size


def _holdings(parameters: dict[str, torch.nn.Parameter], layout: ParallelLayout) -> dict[str, _Holding]:
    """By Megatron name, from every stage and all experts; the same on all ranks.

    The first replica of the experts speaks, whose ranks hold different experts, but the same of everything else.
    """
    speaks = layout.tp_rank == 0 and parallel_state.get_expert_data_parallel_rank() == 0
    mine = {name: _Holding(layout.rank, p.shape) for name, p in parameters.items()} if speaks else {}
    everyone: list[dict[str, _Holding]] = [{} for _ in range(layout.world_size)]
    dist.all_gather_object(everyone, mine, group=layout.control)
    return {name: holding for held in reversed(everyone) for name, holding in held.items()}


def _gathered(
    architecture: Architecture,
    parameters: dict[str, torch.nn.Parameter],
    holdings: dict[str, _Holding],
    layout: ParallelLayout,
    dtype: torch.dtype,
    values: Callable[[torch.nn.Parameter], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """On rank 0 the folder's tensors in order; nothing on the other ranks, which must run through it all the same."""
    for entry in entries(architecture):
        name = next(name for name in entry.megatron if name in holdings)
        mine = values(parameters[name]).to(dtype) if name in parameters else None
        shards = _gather(holdings[name], mine, layout, dtype)
        if shards is not None:
            cut = Cut(architecture, shards[0].size(0) * layout.tp, 0, layout.tp)
            yield from zip(entry.hugging_face, entry.kind.join(shards, cut), strict=True)


def _gather(
    holding: _Holding, mine: Tensor | None, layout: ParallelLayout, dtype: torch.dtype
) -> list[Tensor] | None:
    """On rank 0 a parameter's shards in tensor-parallel order, on the CPU; None on the other ranks.

    The first tensor-parallel group that holds the parameter gathers it, and its first rank hands the shards on to
    rank 0.

    Args:
        mine: this rank's shard; None if it holds none.
    """
    gathers = parallel_state.get_tensor_model_parallel_src_rank() == holding.rank
    if not (gathers or layout.is_main):
        return None
    stacked = torch.empty(layout.tp, *holding.shape, dtype=dtype, device=layout.device)
    if gathers:
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_gather(list(stacked.unbind()), mine, group=group)
    if layout.rank == holding.rank != 0:
        dist.send(stacked, dst=0)
    elif layout.is_main and holding.rank != 0:
        dist.recv(stacked, src=holding.rank)
    return list(stacked.cpu().unbind()) if layout.is_main else None
