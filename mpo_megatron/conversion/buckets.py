"""The optimizer's state of a checkpoint that keeps it in buckets, read in the parameters' own shapes.

Megatron's distributed optimizer flattens a rank's parameters, one after another, into buckets, each of which the ranks
that hold the same parameters share. Its form `dp_reshardable` writes the buckets as they lie, so that no rank gathers
anything: `optimizer.distributed.dp_group_idx_0. ... .bucket_idx_0.exp_avg` is a vector. Which parameter is where in
it Megatron does not write down. This package does, in a file beside the tensors, so that the state can be read at other
sizes of tensor, pipeline or expert parallelism, in other buckets, and under the other kind of layers.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpo_megatron.conversion.torch_dist import CheckpointReader, overlap
from mpo_megatron.errors import CheckpointError

BUCKETS_FILE = "optimizer_buckets.json"
# What Megatron calls the state of a parameter where it is in the parameter's own shape; with experts there are two
# optimizers.
_IN_SHAPE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(param|exp_avg|exp_avg_sq)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, and where it lies in a bucket, row by row.

    Attributes:
        parameter: its name in checkpoints.
        shape: of the whole parameter, with the layers that it is stacked in.
        offsets: where the box begins in it.
        sizes: the box's, as long as `shape`.
        bucket: the name of the bucket's tensors without `.param`, `.exp_avg` or `.exp_avg_sq`.
        start: the place in the bucket.
    """

    parameter: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    bucket: str
    start: int


def write_pieces(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write down what the buckets hold, into a checkpoint's folder."""
    found: dict[str, list[list[object]]] = {}
    for piece in pieces:
        line = [piece.parameter, piece.shape, piece.offsets, piece.sizes, piece.start]
        found.setdefault(piece.bucket, []).append(line)
    lines = (f"{json.dumps(bucket)}: {json.dumps(entries)}" for bucket, entries in sorted(found.items()))
    (folder / BUCKETS_FILE).write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def read_pieces(folder: str | Path) -> list[Piece]:
    """What a checkpoint's buckets hold; nothing where it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(folder) / BUCKETS_FILE
    if not path.exists():
        return []
    try:
        return [
            Piece(name, tuple(shape), tuple(offsets), tuple(sizes), bucket, start)
            for bucket, entries in json.loads(path.read_text(encoding="utf-8")).items()
            for name, shape, offsets, sizes, start in entries
        ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the checkpoint again") from error


class StateReader:
    """The optimizer's state in a checkpoint, by the names that it has in the parameters' own shapes.

    `optimizer.state.exp_avg.decoder.final_layernorm.weight`: a checkpoint of the form `fully_reshardable` has it under
    that name, of one of `dp_reshardable` it is read from the buckets.

    Raises:
        CheckpointError: the file that says what is in the buckets is damaged.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._pieces: dict[str, list[Piece]] = {}
        for piece in read_pieces(reader.folder):
            self._pieces.setdefault(piece.parameter, []).append(piece)

    def __contains__(self, name: str) -> bool:
        return name in self._reader or bool(self._find(name)[1])

    def shape(self, name: str) -> torch.Size:
        if name in self._reader:
            return self._reader.shape(name)
        return torch.Size(self._find(name)[1][0].shape)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of it; what lies beyond the stored tensor (the vocabulary's padding) is zero.

        Raises:
            CheckpointError: it is not there, or a part of the box is in no bucket.
        """
        if name not in self:
            raise CheckpointError(f"{self._reader.folder} has no {name}; it is of another model, or damaged")
        stored = overlap((0,) * len(sizes), self.shape(name), offsets, sizes)
        result = torch.zeros(tuple(sizes))
        if stored is None:
            return result
        in_whole, in_box = stored
        there = [part.start for part in in_whole], [part.stop - part.start for part in in_whole]
        if name in self._reader:
            result[in_box] = self._reader.read_box(name, *there).to(result.dtype)
        else:
            result[in_box] = self._from_buckets(name, *there)
        return result

    def read_whole(self, name: str, first: Sequence[int] = ()) -> Tensor:
        """All of it, or of what is stacked the part at these places of the first dimensions."""
        whole, lead = self.shape(name), len(first)
        offsets = (*first, *(0 for _ in whole[lead:]))
        return self.read(name, offsets, (*(1 for _ in first), *whole[lead:])).reshape(whole[lead:])

    def read_flat(
        self, name: str, offsets: Sequence[int], sizes: Sequence[int], start: int, stop: int
    ) -> Tensor:
        """Of a box, row by row, the elements from `start` to `stop`; other rows than theirs are not read."""
        rows, inner = _rows(sizes)
        first, last = start // inner, -(-stop // inner)
        box = self.read(name, *_only(offsets, sizes, rows, first, last))
        return box.flatten()[start - first * inner : stop - first * inner]

    def _from_buckets(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        state, pieces = self._find(name)
        result = torch.zeros(tuple(sizes))
        filled = torch.zeros(tuple(sizes), dtype=torch.bool)
        for piece in pieces:
            common = overlap(piece.offsets, piece.sizes, offsets, sizes)
            if common is None:
                continue
            in_piece, in_box = list(common[0]), common[1]
            rows, inner = _rows(piece.sizes)
            first, last = in_piece[rows].start, in_piece[rows].stop
            flat = self._reader.read_box(
                f"{piece.bucket}.{state}", (piece.start + first * inner,), ((last - first) * inner,)
            )
            shape = list(piece.sizes)
            shape[rows], in_piece[rows] = last - first, slice(None)
            result[in_box] = flat.view(shape)[tuple(in_piece)].to(result.dtype)
            filled[in_box] = True
        if not filled.all():
            raise CheckpointError(
                f"{self._reader.folder} has no data for {name} {tuple(offsets)}; it is damaged"
            )
        return result

    def _find(self, name: str) -> tuple[str, list[Piece]]:
        """(which state, the pieces of the parameter in buckets)."""
        match = _IN_SHAPE.fullmatch(name)
        return (match[1], self._pieces.get(match[2], [])) if match else ("", [])


def _rows(sizes: Sequence[int]) -> tuple[int, int]:
    """(the first dimension of more than one, the elements of each of its rows)."""
    rows = next((i for i, size in enumerate(sizes) if size > 1), len(sizes) - 1)
    return rows, torch.Size(sizes[rows + 1 :]).numel()


def _only(
    offsets: Sequence[int], sizes: Sequence[int], rows: int, first: int, last: int
) -> tuple[list[int], list[int]]:
    """(offsets, sizes) of those rows of a box."""
    new_offsets, new_sizes = list(offsets), list(sizes)
    new_offsets[rows] += first
    new_sizes[rows] = last - first
    return new_offsets, new_sizes
