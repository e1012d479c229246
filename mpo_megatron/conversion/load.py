"""Fill this rank's model from a Hugging Face folder: each rank reads just its slices."""

from pathlib import Path

import torch

from mpo_megatron.conversion.hf_folder import WeightReader
from mpo_megatron.conversion.names import by_megatron_name
from mpo_megatron.conversion.transforms import Cut
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.runtime.parallel import ParallelLayout


def global_parameter_names(model: GroupModel) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by name, with each layer's number counted over the whole model, not over this stage."""
    named = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            number = model.decoder.layers[int(local)].layer_number - 1
            name = f"decoder.layers.{number}.{rest}"
        named[name] = parameter
    return named


def load_hf_weights(
    model: GroupModel, architecture: Architecture, layout: ParallelLayout, folder: str | Path
) -> None:
    """Fill every parameter of this rank's part of the model from the folder's safetensors files.

    Raises:
        CheckpointError: a file or tensor is missing or has another shape than config.json says.
    """
    reader = WeightReader(folder)
    table = by_megatron_name(architecture)
    for name, parameter in global_parameter_names(model).items():
        assert name in table, f"no Hugging Face name for {name}"
        entry = table[name]
        padded = parameter.size(0) * layout.tp
        cut = Cut(architecture, padded, layout.tp_rank, layout.tp)
        shard = entry.kind.cut(reader.sources(entry, architecture), cut)
        assert shard.shape == parameter.shape, f"{name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
        with torch.no_grad():
            parameter.copy_(shard)
