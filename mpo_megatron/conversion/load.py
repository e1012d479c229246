"""Fill this rank's model from a Hugging Face folder: one replica reads, each of its ranks just its slices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mpo_megatron.conversion.check import check_weights
from mpo_megatron.conversion.hf_folder import WeightReader
from mpo_megatron.conversion.names import Entry, by_megatron_name
from mpo_megatron.conversion.transforms import Cut
from mpo_megatron.errors import CheckpointError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.runtime.parallel import ParallelLayout, raise_together, raising_together

_LAYERS, _EXPERTS = "decoder.layers.", "mlp.experts.local_experts."


def global_parameter_names(model: GroupModel) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by name, layers and experts counted over the whole model, not over this rank's."""
    named = {}
    for name, parameter in model.named_parameters():
        if name.startswith(_LAYERS):
            number, rest = name.removeprefix(_LAYERS).split(".", 1)
            layer = model.decoder.layers[int(number)]
            if rest.startswith(_EXPERTS):
                expert, rest = rest.removeprefix(_EXPERTS).split(".", 1)
                rest = f"{_EXPERTS}{layer.mlp.local_expert_indices[int(expert)]}.{rest}"
            name = f"{_LAYERS}{layer.layer_number - 1}.{rest}"
        named[name] = parameter
    return named


@dataclass(frozen=True)
class _Part:
    """A parameter of this rank, where its values come from, and the ranks that hold the same values."""

    name: str
    parameter: torch.nn.Parameter
    entry: Entry
    cut: Cut
    replicas: dist.ProcessGroup

    @property
    def is_read_here(self) -> bool:
        return dist.get_rank(self.replicas) == 0

    def read(self, reader: WeightReader, target: Tensor) -> None:
        shard = self.entry.kind.cut(reader.slices(self.entry.hugging_face), self.cut)
        assert shard.shape == target.shape, (self.entry, shard.shape, target.shape)
        target.copy_(shard)


def load_hf_weights(
    models: Sequence[GroupModel],
    architecture: Architecture,
    layout: ParallelLayout,
    folder: str | Path,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Fill this rank's part of the model from the folder's safetensors files; all ranks call it.

    Of the ranks that hold the same values (data and context parallel, of experts those that hold the same ones) the
    first reads just its slices and sends them to the others, parameter by parameter.

    Args:
        models: this rank's unwrapped model chunks.
        progress: wraps this rank's parameters while they are filled.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, or not what config.json says; on all ranks alike, and
            before a value is read if the files' headers tell it.
    """
    for _ in _read(models, architecture, layout, folder, lambda part: part.parameter.data, progress):
        pass


def hf_values(
    models: Sequence[GroupModel], architecture: Architecture, layout: ParallelLayout, folder: str | Path
) -> Iterator[tuple[str, torch.nn.Parameter, Tensor]]:
    """This rank's parameters by their global names, with the folder's values in float32 in the parameter's shape.

    Read as `load_hf_weights` reads; all ranks run through it to the end.

    Raises:
        CheckpointError: as `load_hf_weights`.
    """

    def empty(part: _Part) -> Tensor:
        return torch.empty_like(part.parameter.data, dtype=torch.float32)

    for part, values in _read(models, architecture, layout, folder, empty):
        yield part.name, part.parameter, values


def _read(
    models: Sequence[GroupModel],
    architecture: Architecture,
    layout: ParallelLayout,
    folder: str | Path,
    target: Callable[[_Part], Tensor],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Iterator[tuple[_Part, Tensor]]:
    """Each parameter of this rank with the tensor that `target` gave for it, filled."""
    parts = list(_parts(models, architecture, layout))
    read_here = [part for part in parts if part.is_read_here]
    reader: WeightReader | None = None
    with raising_together(layout):
        if read_here:
            reader = WeightReader(folder)
            mine = (part.entry for part in read_here)
            check_weights(reader, mine, architecture, (layout.tp_rank, layout.tp))
    error: CheckpointError | None = None
    for part in progress(parts):
        values = target(part)
        if reader is not None and part.is_read_here and error is None:
            try:
                part.read(reader, values)
            except CheckpointError as caught:
                error = caught  # raised at the end: the other ranks wait for what this one sends
        dist.broadcast(values, group=part.replicas, group_src=0)
        yield part, values
    raise_together(error, layout)


def _parts(
    models: Sequence[GroupModel], architecture: Architecture, layout: ParallelLayout
) -> Iterator[_Part]:
    """All parameters of this rank, in the same order on each rank that holds the same ones."""
    table = by_megatron_name(architecture)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    expert_replicas = parallel_state.get_expert_data_parallel_group()
    for name, parameter in (item for model in models for item in global_parameter_names(model).items()):
        assert name in table, f"no Hugging Face name for {name}"
        cut = Cut(architecture, parameter.size(0) * layout.tp, layout.tp_rank, layout.tp)
        is_expert = not getattr(parameter, "allreduce", True)
        yield _Part(name, parameter, table[name], cut, expert_replicas if is_expert else replicas)
