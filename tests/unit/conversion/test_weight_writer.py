"""Shards are what the safetensors library reads and would write; a folder is there when it is whole, or not at all."""

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpo_megatron.conversion.hf_folder import INDEX, SINGLE, WeightReader
from mpo_megatron.conversion.weight_writer import WeightWriter, write_folder
from mpo_megatron.errors import CheckpointError


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.randn(4, 8).to(dtype) for i in range(5)}  # 128 bytes each in float32


def shapes(source: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in source.items()}


@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (256, 3), (1, 5)])
def test_written_shards_read_back(tmp_path: Path, limit: int, files: int) -> None:
    source = tensors()
    writer = WeightWriter(tmp_path, shapes(source), torch.float32, limit)
    for name, tensor in source.items():
        writer.add(name, tensor)
    writer.close()
    written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(written) == files
    assert (tmp_path / INDEX).exists() == (files > 1)
    assert written[0] == (SINGLE if files == 1 else f"model-00001-of-{files:05d}.safetensors")
    reader = WeightReader(tmp_path)
    assert reader.names() == sorted(source)
    for name, read in zip(source, reader.slices(list(source)), strict=True):
        assert torch.equal(read[:], source[name])
        assert torch.equal(read[1:3], source[name][1:3])
    if files > 1:
        assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 5 * 128


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_file_as_the_library_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    source = {
        "a": torch.randn(3, 5).to(dtype),
        "b": torch.randn(7).to(dtype),
        "c": torch.randn(2, 2).to(dtype),
    }
    writer = WeightWriter(tmp_path, shapes(source), dtype, 10**6)
    for name, tensor in source.items():
        writer.add(name, tensor.t().contiguous().t())  # whatever the strides
    writer.close()
    save_file(source, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_another_dtype_is_converted(tmp_path: Path) -> None:
    writer = WeightWriter(tmp_path, {"a": (3,)}, torch.bfloat16, 10**6)
    values = torch.tensor([1.0, 1.00390625, -3e38])
    writer.add("a", values)
    writer.close()
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], values.bfloat16())


def test_a_forgotten_tensor_is_a_mistake(tmp_path: Path) -> None:
    writer = WeightWriter(tmp_path, {"a": (3,), "b": (3,)}, torch.float32, 10**6)
    with pytest.raises(AssertionError, match="b was given where a was announced"):
        writer.add("b", torch.zeros(3))
    writer = WeightWriter(tmp_path, {"a": (3,), "b": (3,)}, torch.float32, 10**6)
    writer.add("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="b was announced and not given"):
        writer.close()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None)
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=64k"):
        pytest.skip("needs the right to mount a small file system")
    yield disk
    assert libc.umount(str(disk).encode()) == 0


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, small_disk: Path) -> None:
    source, output = tmp_path / "source", small_disk / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")

    def write(kilobytes: int, taken: int = 0) -> None:
        big = {f"t{i}": torch.zeros(256) for i in range(kilobytes)}

        def given() -> Iterator[tuple[str, torch.Tensor]]:
            (small_disk / "other").write_bytes(bytes(taken))  # another process takes the room meanwhile
            yield from big.items()

        write_folder(output, source, shapes(big), torch.float32, given())

    write(1)
    before = sorted(path.read_bytes() for path in output.iterdir())
    with pytest.raises(CheckpointError, match=r"model needs 0\.000131 GB and .* has .* GB free"):
        write(128)
    with pytest.raises(
        CheckpointError, match=r"cannot be written \(No space left on device\); nothing was left"
    ) as kept:
        write(32, taken=30_000)
    # Nor is its room kept by a file that is open, for as long as the error is.
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [path for path in opened if path.startswith(str(small_disk))] == []
    del kept
    assert sorted(path.read_bytes() for path in output.iterdir()) == before
    assert {path.name for path in small_disk.iterdir()} == {"model", "other"}
