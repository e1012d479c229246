"""Megatron's distributed checkpoints (`torch_dist`), read and written piece by piece without Megatron's process groups.

Such a folder is a checkpoint of torch.distributed.checkpoint: `.metadata` says for every name the whole tensor's shape
and, for each chunk of it, where in which `.distcp` file it is; Megatron adds `metadata.json` (the format's name) and
`common.pt` (what is not a tensor). Megatron stacks the layers: `decoder.layers.mlp.linear_fc2.weight` is
[layers, H, F]. Chunks are as the ranks that saved held them; their boundaries mean nothing to a reader.
"""

import io
import json
import pickle
import warnings
import zipfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemWriter,
    SavePlan,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint import save as save_distributed
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from mpo_megatron.conversion.safe_pickle import NotAllowed, read_index
from mpo_megatron.errors import CheckpointError

FORMAT_FILE = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class CheckpointReader:
    """The tensors of a checkpoint by name, read when they are asked for.

    Raises:
        CheckpointError: the folder is no such checkpoint, or a file of it is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            backend = json.loads((self.folder / FORMAT_FILE).read_text())["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder} is not a complete Megatron distributed checkpoint: its {FORMAT_FILE} is missing or "
                "damaged; give another"
            ) from error
        if backend != FORMAT["sharded_backend"]:
            raise CheckpointError(
                f"{self.folder} is a Megatron checkpoint of format {backend!r}; only torch_dist can be read, so save "
                "it again with Megatron's --ckpt-format torch_dist"
            )
        try:
            # Before Megatron's loader reads it, too, which would run what it holds.
            metadata = read_index(self.folder / ".metadata")
        except NotAllowed as error:
            raise CheckpointError(
                f"{self.folder / '.metadata'} is no index of a checkpoint: {error}; nothing of it was run, so take the "
                "checkpoint from a place that you trust"
            ) from error
        except (OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.folder / '.metadata'} cannot be read ({error}); copy the checkpoint again"
            ) from error
        self.objects = [
            n for n, m in metadata.state_dict_metadata.items() if not isinstance(m, TensorStorageMetadata)
        ]
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: found
            for name, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        self._places: dict[MetadataIndex, Any] = metadata.storage_data
        self._starts: dict[str, list[int]] = {}  # of the chunks of vectors that have been read
        self._check_files()

    def _check_files(self) -> None:
        """Every file must be there, as long as the chunks in it."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise CheckpointError(
                    f"{self.folder / '.metadata'} names {name}, which is outside of the checkpoint; take the "
                    "checkpoint from a place that you trust"
                )
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, though .metadata names it; copy the file there")
            if path.stat().st_size < end:
                raise CheckpointError(
                    f"{path} is cut off: {path.stat().st_size} bytes where .metadata says at least {end}; copy it again"
                )

    def check(self, part: int, parts: int) -> None:
        """Check one of `parts` shares of what is stored: that each byte that matters is as torch has written it.

        Each tensor's chunk, and each object, is a ZIP archive with a CRC-32 of its content, which torch does not look
        at when it reads.

        Raises:
            CheckpointError: something is not as it was written.
        """
        places = sorted(self._places.items(), key=lambda item: (item[1].relative_path, item[1].offset))
        for index, place in places[part::parts]:
            path = self.folder / place.relative_path
            try:
                with path.open("rb") as file:
                    view = io.BufferedReader(_Part(file, place.offset, place.length))
                    with zipfile.ZipFile(view) as archive:
                        bad = archive.testzip()
            except (
                OSError,
                zipfile.BadZipFile,
                zlib.error,
                NotImplementedError,
                EOFError,
                ValueError,
            ) as error:
                raise CheckpointError(f"{path} is not as it was written, at {index.fqn} ({error})") from error
            if bad is not None:
                raise CheckpointError(f"{path} is not as it was written, at {index.fqn}")
            # Its headers have no checksum.
            if index.fqn in self._tensors:
                self._read_chunk(index.fqn, place)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str, first: Sequence[int] = ()) -> Tensor:
        """A tensor, or of a stacked one the part at these places of the first dimensions.

        Args:
            name: the tensor's.
            first: for example (layer,) or nothing.
        """
        whole, lead = self.shape(name), len(first)
        offsets = (*first, *(0 for _ in whole[lead:]))
        sizes = (*(1 for _ in first), *whole[lead:])
        return self.read_box(name, offsets, sizes).reshape(whole[lead:])

    def read_box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The part of a tensor that begins at `offsets` and is of the shape `sizes`."""
        result: Tensor | None = None
        for chunk in self._near(name, offsets, sizes):
            common = overlap(chunk.offsets, chunk.sizes, offsets, sizes)
            if common is None:
                continue
            (in_chunk, in_result), part = common, self._load(name, chunk)
            # One chunk has it all: nothing to put together.
            if part[in_chunk].numel() == torch.Size(sizes).numel():
                return part[in_chunk]
            if result is None:
                result = torch.empty(tuple(sizes), dtype=part.dtype)
            result[in_result] = part[in_chunk]
        if result is None:
            raise CheckpointError(f"{self.folder} has no data for {name} {tuple(offsets)}; it is damaged")
        return result

    def _near(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[ChunkStorageMetadata]:
        """The chunks that a box may meet: of a vector, which may have thousands, those alone that it does."""
        chunks: list[ChunkStorageMetadata] = self._tensors[name].chunks
        if len(offsets) != 1:
            return chunks
        if name not in self._starts:
            chunks.sort(key=lambda chunk: chunk.offsets[0])
            self._starts[name] = [chunk.offsets[0] for chunk in chunks]
        starts = self._starts[name]
        first = max(bisect_right(starts, offsets[0]) - 1, 0)
        return chunks[first : bisect_left(starts, offsets[0] + sizes[0])]

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        return self._read_chunk(name, self._places[MetadataIndex(name, chunk.offsets)])

    def _read_chunk(self, name: str, place: Any) -> Tensor:
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                view = io.BufferedReader(_Part(file, place.offset, place.length))
                tensor: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{path} cannot be read at {name} ({' '.join(str(error).split())[:120]}); copy it again"
            ) from error
        return tensor


def overlap(
    one_offsets: Sequence[int], one_sizes: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes of a tensor meet: (slices of the first, slices of the second), or None."""
    in_one, in_other = [], []
    for start, length, offset, size in zip(one_offsets, one_sizes, offsets, sizes, strict=True):
        low, high = max(start, offset), min(start + length, offset + size)
        if low >= high:
            return None
        in_one.append(slice(low - start, high - start))
        in_other.append(slice(low - offset, high - offset))
    return tuple(in_one), tuple(in_other)


class _Part(io.RawIOBase):
    """A part of an open file as a file of its own, so that torch.load sees where it ends."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + position
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self._at, 0)]
        self._file.seek(self._offset + self._at)
        count: int = self._file.readinto(view)
        self._at += count
        return count


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor to write, whose values are made when its turn comes.

    Attributes:
        name: the tensor's.
        shape: of the whole tensor.
        offsets: where the piece begins.
        sizes: the piece's own shape, as long as `shape`.
        dtype: of the tensor.
        values: makes the piece, of any shape with as many elements.
    """

    name: str
    shape: torch.Size
    offsets: torch.Size
    sizes: torch.Size
    dtype: torch.dtype
    values: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.sizes.numel() * self.dtype.itemsize


class _Streaming(DefaultSavePlanner):
    """Has each chunk made as it is written, where torch's planner takes tensors that are there."""

    def __init__(self, chunks: Iterable[Chunk], written: Callable[[int], Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._written = written
        self._chunks = {(chunk.name, chunk.offsets): chunk for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(chunk) for chunk in self._chunks.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        chunk = self._chunks[write_item.index.fqn, write_item.index.offset]
        self._written(chunk.nbytes)
        return chunk.values().to(chunk.dtype).reshape(chunk.sizes).contiguous()


def _write_item(chunk: Chunk) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(chunk.name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(chunk.offsets, chunk.sizes),
            properties=TensorProperties(dtype=chunk.dtype),
            size=chunk.shape,
        ),
    )


def write_checkpoint(
    folder: Path, chunks: Sequence[Chunk], common: dict[str, Any], written: Callable[[int], Any]
) -> None:
    """Write a checkpoint into an empty folder, one chunk in memory at a time.

    Args:
        folder: an existing one.
        chunks: that fill their tensors without overlap.
        common: what is not a tensor.
        written: is told the bytes of each chunk.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
        save_distributed(
            {}, storage_writer=FileSystemWriter(folder), planner=_Streaming(chunks, written), no_dist=True
        )
    torch.save(common, folder / "common.pt")
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))
