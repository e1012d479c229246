"""What a model's folder holds, in lines for a person."""

from collections.abc import Iterator
from pathlib import Path

import torch

from mpo_megatron.conversion.hf_folder import WeightReader, is_checkpoint, model_folder
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.model.architecture import Architecture, read_architecture

_OPTIMIZER = "optimizer."


def describe(folder: str | Path, *, tensors: bool = False) -> Iterator[str]:
    """Lines about a Hugging Face folder or a Megatron checkpoint.

    Args:
        tensors: with one line for every tensor: name, type, shape.

    Raises:
        UserError: it is neither, or is incomplete.
    """
    path = Path(folder)
    architecture = read_architecture(model_folder(path))
    if is_checkpoint(path):
        yield f"{path}: Megatron distributed checkpoint (torch_dist)"
        yield f"model      {_model(architecture)}"
        yield from _checkpoint(path, tensors)
    else:
        yield f"{path}: Hugging Face folder"
        yield f"model      {_model(architecture)}"
        yield from _folder(path, tensors)


def _model(architecture: Architecture) -> str:
    return (
        f"{architecture.family}, {architecture.num_parameters:,} parameters: {architecture.num_layers} layers of "
        f"{architecture.hidden_size}, {architecture.num_heads} heads over {architecture.num_kv_heads}, vocabulary "
        f"{architecture.vocab_size:,}, embeddings {'tied' if architecture.tied_embeddings else 'untied'}"
    )


def _checkpoint(path: Path, tensors: bool) -> Iterator[str]:
    reader = CheckpointReader(path)
    weights = [name for name in reader.names() if not name.startswith(_OPTIMIZER)]
    state = [name for name in reader.names() if name.startswith(_OPTIMIZER)]
    yield f"weights    {_sizes([(reader.shape(name), reader.dtype(name)) for name in weights])}"
    if state:
        yield f"optimizer  {_sizes([(reader.shape(name), reader.dtype(name)) for name in state])}"
        common = torch.load(path / "common.pt", map_location="cpu", weights_only=False)
        yield f"step       {common['step']}"
    else:
        yield "optimizer  none: a start, not a training run's"
    if tensors:
        for name in weights + state:
            yield _line(name, str(reader.dtype(name)), reader.shape(name))


def _folder(path: Path, tensors: bool) -> Iterator[str]:
    reader = WeightReader(path)
    found = [(name, reader.lazy(name)[:0].dtype, reader.lazy(name).get_shape()) for name in reader.names()]
    yield f"weights    {_sizes([(torch.Size(shape), dtype) for _, dtype, shape in found])}"
    if tensors:
        for name, dtype, shape in found:
            yield _line(name, str(dtype), shape)


def _sizes(tensors: list[tuple[torch.Size, torch.dtype]]) -> str:
    size = sum(shape.numel() * dtype.itemsize for shape, dtype in tensors)
    kinds = sorted({str(dtype).removeprefix("torch.") for _, dtype in tensors})
    return f"{len(tensors)} tensors, {size / 1e9:.3g} GB of {', '.join(kinds)}"


def _line(name: str, dtype: str, shape: object) -> str:
    return f"{name}  {dtype.removeprefix('torch.')} {list(shape)}"  # type: ignore[call-overload]
