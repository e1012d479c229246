"""What a model's folder holds, in lines for a person."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpo_megatron.conversion.hf_folder import DTYPES, WeightReader, is_checkpoint, model_folder
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.model.architecture import Architecture, read_architecture

# Where there are experts, Megatron has two optimizers.
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


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
    weights = [name for name in reader.names() if not _OPTIMIZER.match(name)]
    state = [name for name in reader.names() if _OPTIMIZER.match(name)]

    def sizes(names: list[str]) -> str:
        size = sum(reader.shape(name).numel() * reader.dtype(name).itemsize for name in names)
        return _sizes(len(names), size, (str(reader.dtype(name)) for name in names))

    yield f"weights    {sizes(weights)}"
    if state:
        # Megatron-core 0.16 has it in a file, later ones among the tensors.
        from megatron.core.dist_checkpointing.serialization import load_common_state_dict

        common = load_common_state_dict(str(path))
        form = (common.get("content_metadata") or {}).get(
            "distrib_optim_sharding_type", "of the plain optimizer"
        )
        yield f"optimizer  {sizes(state)}, {form}"
        yield f"step       {common['step']}"
    else:
        yield "optimizer  none: a start, not a training run's"
    if tensors:
        for name in weights + state:
            yield _line(name, str(reader.dtype(name)), reader.shape(name))


def _folder(path: Path, tensors: bool) -> Iterator[str]:
    reader = WeightReader(path)
    stored = {name: reader.stored(name) for name in reader.names()}
    # A quantised model, which nothing here can load, has dtypes that torch may not know.
    found = {name: str(DTYPES.get(one.dtype, one.dtype)) for name, one in stored.items()}
    size = sum((path / file).stat().st_size for file in {one.file for one in stored.values()})
    yield f"weights    {_sizes(len(stored), size, found.values())}"
    if tensors:
        for name, one in stored.items():
            yield _line(name, found[name], one.shape)


def _sizes(count: int, size: int, dtypes: Iterable[str]) -> str:
    kinds = sorted({dtype.removeprefix("torch.") for dtype in dtypes})
    return f"{count} tensors, {size / 1e9:.3g} GB of {', '.join(kinds)}"


def _line(name: str, dtype: str, shape: Iterable[int]) -> str:
    return f"{name}  {dtype.removeprefix('torch.')} {list(shape)}"
