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


class BucketReader:
    """The state of each parameter by the name that Megatron has for it in the form `fully_reshardable`.

    Raises:
        CheckpointError: the file that says where it is is damaged.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._pieces: dict[str, list[Piece]] = {}
        for piece in read_pieces(reader.folder):
            self._pieces.setdefault(piece.parameter, []).append(piece)

    def __contains__(self, name: str) -> bool:
        return bool(self._find(name)[1])

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of it, as large as asked for; what lies beyond the stored tensor (the vocabulary's padding) is zero.

        Raises:
            CheckpointError: a part of the box is in no bucket.
        """
        state, pieces = self._find(name)
        result = torch.zeros(tuple(sizes))
        filled = torch.zeros(tuple(sizes), dtype=torch.bool)
        for piece in pieces:
            common = overlap(piece.offsets, piece.sizes, offsets, sizes)
            if common is None:
                continue
            in_piece, in_box = common
            count = torch.Size(piece.sizes).numel()
            flat = self._reader.read_box(f"{piece.bucket}.{state}", (piece.start,), (count,))
            result[in_box] = flat.view(piece.sizes)[in_piece].to(result.dtype)
            filled[in_box] = True
        stored = overlap((0,) * len(sizes), pieces[0].shape, offsets, sizes) if pieces else None
        if stored is None or not filled[stored[1]].all():
            raise CheckpointError(
                f"{self._reader.folder} has no data for {name} {tuple(offsets)}; it is damaged"
            )
        return result

    def read_whole(self, name: str, first: Sequence[int] = ()) -> Tensor:
        """All of it, or of what is stacked the part at these places of the first dimensions."""
        whole, lead = self._find(name)[1][0].shape, len(first)
        offsets = (*first, *(0 for _ in whole[lead:]))
        return self.read(name, offsets, (*(1 for _ in first), *whole[lead:])).reshape(whole[lead:])

    def _find(self, name: str) -> tuple[str, list[Piece]]:
        """(which state, the pieces of the parameter)."""
        match = _IN_SHAPE.fullmatch(name)
        return (match[1], self._pieces.get(match[2], [])) if match else ("", [])
