"""Fill this rank's model from a Hugging Face folder: one replica reads, each of its ranks just its slices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

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

    parameter: torch.nn.Parameter
    entry: Entry
    cut: Cut
    replicas: dist.ProcessGroup

    @property
    def is_read_here(self) -> bool:
        return dist.get_rank(self.replicas) == 0

    def read(self, reader: WeightReader) -> None:
        shard = self.entry.kind.cut(reader.slices(self.entry.hugging_face), self.cut)
        assert shard.shape == self.parameter.shape, (self.entry, shard.shape, self.parameter.shape)
        self.parameter.data.copy_(shard)

    def share(self) -> None:
        """Hand the values on from the rank that has read them."""
        dist.broadcast(self.parameter.data, group=self.replicas, group_src=0)


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
        if reader is not None and part.is_read_here and error is None:
            try:
                part.read(reader)
            except CheckpointError as caught:
                error = caught  # raised at the end: the other ranks wait for what this one sends
        part.share()
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
        yield _Part(parameter, table[name], cut, expert_replicas if is_expert else replicas)
