"""Safetensors shards, written tensor by tensor as they come.

The safetensors library writes a file from tensors that are all in memory: a shard of 5 GB at a time, where a layer of
the model takes a tenth of it. The format (https://huggingface.co/docs/safetensors) puts names, types, shapes and places
in front of the data, and these are known before any tensor is there. So only the tensor at hand is in memory.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mpo_megatron.conversion.hf_folder import DTYPES, INDEX, SINGLE, copy_all_but_weights
from mpo_megatron.runtime.publish import check_space, published

MAX_SHARD_BYTES = 5 * 10**9

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightWriter:
    """Writes tensors, given in the order that was announced, to sharded safetensors files and their index."""

    def __init__(
        self, folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        """Plan the shards; nothing is written yet.

        Args:
            folder: where the files go.
            shapes: of every tensor that will be given, in that order.
            dtype: of all of them.
            max_shard_bytes: a shard that would grow over it is followed by another.
        """
        self.folder, self.dtype = folder, dtype
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.total_bytes = sum(self._bytes(name) for name in self.shapes)
        self._shards = self._plan(max_shard_bytes)
        count = len(self._shards)
        self._files = (
            [SINGLE]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._to_come = [(i, name) for i, names in enumerate(self._shards) for name in names][::-1]
        self._number = -1  # of the open shard
        self._file: BinaryIO | None = None

    def _bytes(self, name: str) -> int:
        return self.shapes[name].numel() * self.dtype.itemsize

    def _plan(self, max_shard_bytes: int) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name in self.shapes:
            if shards[-1] and size + self._bytes(name) > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self._bytes(name)
        return shards

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, in the writer's dtype whatever its own."""
        number, expected = self._to_come.pop()
        assert name == expected, f"{name} was given where {expected} was announced"
        assert tensor.shape == self.shapes[name], f"{name} is {tuple(tensor.shape)}"
        if number != self._number:
            self._close_shard()
            self._number, self._file = number, (self.folder / self._files[number]).open("wb")
            self._file.write(self._header(self._shards[number]))
        assert self._file is not None
        data = tensor.detach().cpu().to(self.dtype).contiguous()
        self._file.write(data.flatten().view(torch.uint8).numpy().data)

    def _header(self, names: list[str]) -> bytes:
        """Its length in 8 bytes, little-endian; JSON, padded with spaces so that the data begin at a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in names:
            stop = start + self._bytes(name)
            entries[name] = {
                "dtype": _NAMES[self.dtype],
                "shape": list(self.shapes[name]),
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _close_shard(self) -> None:
        if self._file is not None:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            self._file = None

    def abandon(self) -> None:
        """Close the open shard as it is: a file that is open keeps its room on a full disk, though it is removed."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what it has not written yet
                self._file.close()
            self._file = None

    def close(self) -> None:
        """Complete the last shard, and write the index where there are several."""
        assert not self._to_come, f"{self._to_come[-1][1]} was announced and not given"
        self._close_shard()
        if len(self._files) > 1:
            weight_map = {
                name: file for file, names in zip(self._files, self._shards, strict=True) for name in names
            }
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_folder(
    output: Path,
    source: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Make a Hugging Face folder; it appears under its name when it is complete, in the place of an older one.

    Args:
        output: the folder to make.
        source: the folder that config, generation config, tokenizer and chat template are taken from.
        shapes: of the weights, by name, in the order of `tensors`.
        dtype: that the weights are written in.
        tensors: the weights, read one by one.

    Raises:
        CheckpointError: the file system has no room or refuses to write.
    """
    with published(output) as temporary:
        writer = WeightWriter(temporary, shapes, dtype, max_shard_bytes)
        check_space(output, writer.total_bytes)
        copy_all_but_weights(source, temporary, dtype)
        try:
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
