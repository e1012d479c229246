"""Hugging Face folder to Megatron distributed checkpoint and back, streamed: no GPU, no process group, no whole model.

A checkpoint made here holds the model's weights, and in its folder `hf` what else belongs to the model (config,
generation config, tokenizer, chat template), as the checkpoints of a training run do. Memory at a time: one layer or a
piece of the embedding.

As a module of its own, `python -m mpo_megatron.conversion.convert CHECKPOINT OUTPUT [DTYPE]` is what a run starts for
its exports in the background; people have tools/convert_checkpoint.py.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpo_megatron.conversion.buckets import StateReader
from mpo_megatron.conversion.check import check_weights
from mpo_megatron.conversion.hf_folder import DTYPES, HF_FOLDER, WeightReader, copy_all_but_weights
from mpo_megatron.conversion.names import Entry, entries
from mpo_megatron.conversion.torch_dist import FORMAT_FILE, CheckpointReader, Chunk, write_checkpoint
from mpo_megatron.conversion.transforms import VOCABULARY, Cut
from mpo_megatron.conversion.weight_writer import MAX_SHARD_BYTES, write_folder
from mpo_megatron.errors import CheckpointError, UserError
from mpo_megatron.model.architecture import Architecture, read_architecture
from mpo_megatron.runtime.publish import check_space, published, reading

# The embedding is written in pieces of so many bytes, so that it is not in memory whole.
PIECE_BYTES = 64 * 2**20
# Before the name of a parameter: that of its float32 master in a run's checkpoint, with the distributed optimizer and
# without it; where there are experts, Megatron has two optimizers, theirs the second.
_MASTERS = [
    f"{part}optimizer.state.{key}."
    for part in ("", "chained_0.", "chained_1.")
    for key in ("param", "fp32_param")
]


def import_hf(hf: str | Path, output: str | Path, *, progress: bool = False) -> None:
    """Make a distributed checkpoint of a Hugging Face folder's weights, in their own dtype.

    Any layout opens it, under the local layer spec and under Transformer Engine's. It appears under its name when it is
    complete, in the place of an older one.

    Args:
        hf: the folder.
        output: the checkpoint to make.
        progress: show a bar.

    Raises:
        ConfigError: config.json is missing or of a model that is not supported.
        CheckpointError: a weight is missing, damaged or of another shape; or the checkpoint cannot be written.
    """
    source, target = Path(hf), Path(output)
    architecture = read_architecture(source)
    reader = WeightReader(source)
    check_weights(reader, entries(architecture), architecture)
    chunks = [chunk for entry in entries(architecture) for chunk in _chunks(entry, reader, architecture)]
    size = sum(chunk.nbytes for chunk in chunks)
    with published(target) as temporary, _bar("import", size, progress) as bar:
        check_space(target, size)
        write_checkpoint(temporary, chunks, {}, bar.update)
        (temporary / HF_FOLDER).mkdir()
        copy_all_but_weights(source, temporary / HF_FOLDER, chunks[0].dtype)


def _chunks(entry: Entry, reader: WeightReader, architecture: Architecture) -> Iterator[Chunk]:
    """The pieces of one parameter, or of its layer in the stack."""
    dtype = DTYPES[reader.stored(entry.hugging_face[0]).dtype]
    name, place = entry.stored
    if entry.kind is VOCABULARY:
        (whole,) = entry.shapes(architecture).values()
        rows = max(1, PIECE_BYTES // (whole[1] * dtype.itemsize))
        for start, stop in pairwise([*range(0, whole[0], rows), whole[0]]):
            yield Chunk(name, whole, torch.Size((start, 0)), torch.Size((stop - start, whole[1])), dtype,
                        partial(_rows, reader, entry, start, stop))  # fmt: skip
        return
    shape = _megatron_shape(entry, architecture)
    values = partial(_parameter, reader, entry, architecture)
    stack = _stack(place, architecture)
    yield Chunk(name, torch.Size((*stack, *shape)), torch.Size((*place, *(0 for _ in shape))),
                torch.Size((*(1 for _ in stack), *shape)), dtype, values)  # fmt: skip


def _rows(reader: WeightReader, entry: Entry, start: int, stop: int) -> Tensor:
    (source,) = reader.slices(entry.hugging_face)
    rows: Tensor = source[start:stop]
    return rows


def _parameter(reader: WeightReader, entry: Entry, architecture: Architecture) -> Tensor:
    return entry.kind.cut(reader.slices(entry.hugging_face), Cut(architecture, 0, 0, 1))


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Make a Hugging Face folder of a distributed checkpoint: of `import_hf`, or of a training run at any layout.

    The vocabulary's padding is left out, tied weights are written once. The folder appears under its name when it is
    complete, in the place of an older one.

    Args:
        checkpoint: the folder; a run's are in `checkpoints/step_NNNNNNN`.
        output: the folder to make.
        dtype: of the weights; None: as they are. In float32 a bf16 run's checkpoint gives the optimizer's master
            weights, which hold more.
        max_shard_bytes: of a safetensors file.
        progress: show a bar.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of another model than its config says; or the folder
            cannot be written.
    """
    folder = Path(checkpoint)
    reader = CheckpointReader(folder)
    state = StateReader(reader)
    source = folder / HF_FOLDER
    architecture = read_architecture(source)
    found = [(entry, *_find(entry, reader, state, architecture, dtype)) for entry in entries(architecture)]

    def tensors(bar: Any) -> Iterator[tuple[str, Tensor]]:
        for entry, name, place in found:
            value = reader.read(name, place) if name in reader else state.read_whole(name, place)
            joined = entry.kind.join([value], Cut(architecture, value.size(0), 0, 1))
            for hf_name, tensor in zip(entry.hugging_face, joined, strict=True):
                yield hf_name, tensor
                bar.update(tensor.nbytes)

    shapes = {name: shape for entry, *_ in found for name, shape in entry.shapes(architecture).items()}
    first = found[0][1]
    stored = reader.dtype(first) if first in reader else torch.float32
    dtype = dtype or stored
    size = sum(shape.numel() for shape in shapes.values()) * stored.itemsize
    # The run that made the checkpoint may want to remove it meanwhile.
    with _bar("export", size, progress) as bar, reading(folder / FORMAT_FILE):
        write_folder(Path(output), source, shapes, dtype, tensors(bar), max_shard_bytes)


def _bar(title: str, size: int, shown: bool) -> Any:
    return tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=not shown, dynamic_ncols=True)


def _find(
    entry: Entry,
    reader: CheckpointReader,
    state: StateReader,
    architecture: Architecture,
    dtype: torch.dtype | None,
) -> tuple[str, tuple[int, ...]]:
    """The name of a parameter in the checkpoint, and its place in the stack of layers where it is in one.

    That of its master in the optimizer's state, if `dtype` can hold more than the parameter does and it is there.
    """
    stacked, place = entry.stored
    names = {stacked: place, **dict.fromkeys(entry.megatron, ())}
    name = next((name for name in names if name in reader), None)
    if name is None:
        raise CheckpointError(
            f"{reader.folder} has no tensor {stacked}, which the model of its config.json needs; its files do not "
            "belong together"
        )
    stack = _stack(names[name], architecture)
    found, wanted = reader.shape(name), torch.Size((*stack, *_megatron_shape(entry, architecture)))
    padded = entry.kind is VOCABULARY and found[0] >= wanted[0]
    if found[padded:] != wanted[padded:]:
        raise CheckpointError(
            f"{reader.folder}: {name} has shape {tuple(found)} where config.json asks for {tuple(wanted)}; "
            "its files do not belong together"
        )
    candidates = [f"{prefix}{name}" for prefix in _MASTERS]
    masters = [master for master in candidates if master in state]
    finer = dtype is not None and dtype.itemsize > reader.dtype(name).itemsize
    return masters[0] if finer and masters else name, names[name]


def _stack(place: tuple[int, ...], architecture: Architecture) -> torch.Size:
    """The dimensions before a parameter's own in a checkpoint: layers, and experts of each."""
    experts = 1 if architecture.experts is None else architecture.experts.number
    return torch.Size((architecture.num_layers, experts)[: len(place)])


def _megatron_shape(entry: Entry, architecture: Architecture) -> torch.Size:
    """Of a parameter on one rank, of its layer alone; vocabulary without padding."""
    sources = [torch.empty(shape, device="meta") for shape in entry.shapes(architecture).values()]
    rows = sources[0].shape[0]
    return entry.kind.cut(sources, Cut(architecture, rows, 0, 1)).shape


if __name__ == "__main__":
    os.nice(10)  # training comes first
    try:
        checkpoint, output, *dtype = sys.argv[1:]
        export_checkpoint(checkpoint, output, dtype=getattr(torch, dtype[0]) if dtype else None)
    except UserError as error:
        sys.exit(f"error: {error}")
