"""Checkpoints read back piece by piece, whatever the chunks, and a sentence for each damaged one."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mpo_megatron.conversion.torch_dist import CheckpointReader, Chunk, write_checkpoint
from mpo_megatron.errors import CheckpointError

STACK = torch.randn(3, 8, 6)
PLAIN = torch.randn(5).bfloat16()


def pieces(name: str, tensor: torch.Tensor, *sizes: int) -> list[Chunk]:
    """The tensor in a grid of chunks of these sizes."""
    starts = [range(0, whole, size) for whole, size in zip(tensor.shape, sizes, strict=True)]
    chunks = []
    for offsets in (
        torch.cartesian_prod(*[torch.tensor(list(s)) for s in starts]).reshape(-1, len(sizes)).tolist()
    ):
        box = tuple(slice(o, min(o + s, w)) for o, s, w in zip(offsets, sizes, tensor.shape, strict=True))
        part = tensor[box]
        chunks.append(Chunk(name, tensor.shape, torch.Size(offsets), part.shape, tensor.dtype, part.clone))
    return chunks


def write(folder: Path, *sizes: int) -> Path:
    folder.mkdir()
    chunks = [*pieces("stack", STACK, *sizes), *pieces("plain", PLAIN, 5)]
    write_checkpoint(folder, chunks, {"step": 7}, lambda _: None)
    return folder


@pytest.mark.parametrize("sizes", [(3, 8, 6), (1, 8, 6), (1, 4, 6), (1, 4, 3), (2, 3, 4)])
def test_any_chunks_read_back(sizes: tuple[int, ...], tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path / "checkpoint", *sizes))
    assert reader.names() == ["plain", "stack"]
    assert "stack" in reader
    assert "absent" not in reader
    assert (reader.shape("stack"), reader.dtype("plain")) == (STACK.shape, torch.bfloat16)
    assert torch.equal(reader.read("stack"), STACK)
    assert all(torch.equal(reader.read("stack", (i,)), STACK[i]) for i in range(3))
    assert torch.equal(reader.read("stack", (1, 5)), STACK[1, 5])
    assert torch.equal(reader.read("plain"), PLAIN)


def test_chunks_are_made_one_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def values(name: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            written = sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
            made.append(name)
            assert written >= 4 * 10**6 * (len(made) - 1), "the chunks before are in the file already"
            return torch.zeros(10**6)

        return make

    size = torch.Size([10**6])
    chunks = [Chunk(n, size, torch.Size([0]), size, torch.float32, values(n)) for n in "abc"]
    told: list[int] = []
    write_checkpoint(tmp_path, chunks, {}, told.append)
    assert made == ["a", "b", "c"]
    assert told == [4 * 10**6] * 3


def remove_data(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def cut_data(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def damage_data(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


def cut_metadata(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:100])


def remove_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def remove_format(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def other_format(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))


def lose_chunks(folder: Path) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["stack"].chunks.clear()
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_data, r"__0_0\.distcp is missing, though \.metadata names it"),
        (cut_data, r"__0_0\.distcp is cut off: \d+ bytes where \.metadata says at least \d+"),
        (damage_data, r"__0_0\.distcp cannot be read at stack \("),
        (cut_metadata, r"\.metadata cannot be read"),
        (remove_metadata, r"\.metadata cannot be read .*No such file"),
        (remove_format, r"is not a complete Megatron distributed checkpoint: its metadata\.json is missing"),
        (other_format, r"of format 'zarr'; only torch_dist can be read"),
        (lose_chunks, r"has no data for stack"),
    ],
)
def test_damage_is_one_sentence(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", 1, 4, 6)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(folder).read("stack")
    assert "\n" not in str(caught.value)
