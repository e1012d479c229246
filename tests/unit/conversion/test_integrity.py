"""Whether a checkpoint is as it was written: every byte that matters, of tensors and of all other files."""

import os
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from mpo_megatron.conversion.integrity import DIGESTS_FILE, check_digests, write_digests
from mpo_megatron.conversion.torch_dist import CheckpointReader, Chunk, write_checkpoint
from mpo_megatron.errors import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensors, one of them in two chunks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    generator = torch.Generator().manual_seed(0)
    chunks = []
    for name, shape, parts in (("a", (64, 33), 2), ("b", (500,), 1)):
        rows = shape[0] // parts
        for part in range(parts):
            values = torch.randn((rows, *shape[1:]), generator=generator)
            offsets = torch.Size((part * rows, *(0 for _ in shape[1:])))
            make = partial(torch.clone, values)
            chunks.append(Chunk(name, torch.Size(shape), offsets, values.shape, values.dtype, make))
    write_checkpoint(folder, chunks, {"step": 3}, lambda nbytes: None)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    write_digests(folder)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


def test_a_whole_one_passes_and_sha256sum_agrees(whole: Path) -> None:
    check_digests(whole)
    for part in range(3):
        CheckpointReader(whole).check(part, 3)
    done = subprocess.run(["sha256sum", "--check", "--quiet", DIGESTS_FILE], cwd=whole, capture_output=True)
    assert done.returncode == 0, done.stderr
    listed = {line.split("  ")[1] for line in (whole / DIGESTS_FILE).read_text().splitlines()}
    assert listed == {".metadata", "common.pt", "metadata.json", "hf/config.json"}


def test_a_changed_bit_is_found_or_changes_nothing(whole: Path, copied: Path) -> None:
    """What is not found lies between the archives' contents, where nothing is read."""
    (file,) = copied.glob("*.distcp")
    intact, draw = file.read_bytes(), random.Random(0)
    before = {name: CheckpointReader(whole).read(name) for name in ("a", "b")}
    found = 0
    for _ in range(150):
        file.write_bytes(intact)
        change(file, draw.randrange(len(intact)))
        reader = CheckpointReader(copied)
        try:
            reader.check(0, 1)
        except CheckpointError:
            found += 1
        else:
            assert all(torch.equal(reader.read(name), values) for name, values in before.items())
    assert found > 100


@pytest.mark.parametrize("part", [0, 1, 2])
def test_each_share_is_one_ranks(part: int, copied: Path) -> None:
    """One chunk is changed, and one of three ranks finds it."""
    (file,) = copied.glob("*.distcp")
    reader = CheckpointReader(copied)
    places = sorted(reader._places.values(), key=lambda place: place.offset)
    change(file, places[part].offset + places[part].length // 2)
    finders = []
    for rank in range(3):
        try:
            reader.check(rank, 3)
        except CheckpointError:
            finders.append(rank)
    assert finders == [part]


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "hf/config.json"])
def test_a_changed_or_missing_file_is_found(name: str, copied: Path) -> None:
    change(copied / name, (copied / name).stat().st_size // 2)
    with pytest.raises(CheckpointError, match="is not as it was written"):
        check_digests(copied)
    os.remove(copied / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_digests(copied)


def test_one_without_digests_passes(copied: Path) -> None:
    (copied / DIGESTS_FILE).unlink()
    check_digests(copied)
