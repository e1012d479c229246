"""Safetensors folders: lazy reading, and a sentence for each broken folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpo_megatron.conversion.hf_folder import INDEX, SINGLE, WeightReader, copy_all_but_weights
from mpo_megatron.conversion.weight_writer import WeightWriter
from mpo_megatron.errors import CheckpointError
from tests.helpers.models import make_llama


def tensors() -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.randn(4, 8) for i in range(5)}  # 128 bytes each


def write_shards(folder: Path) -> dict[str, Any]:
    """Three shards of two, two and one tensors. Returns their index."""
    source = tensors()
    writer = WeightWriter(folder, {name: t.shape for name, t in source.items()}, torch.float32, 256)
    for name, tensor in source.items():
        writer.add(name, tensor)
    writer.close()
    return json.loads((folder / INDEX).read_text())


def assert_refused(folder: Path, *parts: str) -> None:
    """Opening the folder raises one sentence with all of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        WeightReader(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_shard_is_named(tmp_path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert_refused(tmp_path, str(tmp_path / "model-00002-of-00003.safetensors"), "is missing", "download")


@pytest.mark.parametrize("kept", ["nothing", "3 bytes", "half the header", "the header", "all but one byte"])
def test_a_shard_cut_short_is_named_when_the_folder_is_opened(tmp_path, kept: str) -> None:
    write_shards(tmp_path)
    path = tmp_path / "model-00003-of-00003.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    length = {
        "nothing": 0,
        "3 bytes": 3,
        "half the header": header // 2,
        "the header": header,
        "all but one byte": len(content) - 1,
    }[kept]
    path.write_bytes(content[:length])
    assert_refused(tmp_path, f"{path} cannot be read as safetensors", "copy or download it again")


def test_a_git_lfs_pointer_is_named(tmp_path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
    (tmp_path / SINGLE).write_text(pointer)
    assert_refused(tmp_path, f"{tmp_path / SINGLE} is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": {"t0": 1}}'])
def test_a_broken_index_is_named(tmp_path, content: str) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(content)
    assert_refused(tmp_path, f"{tmp_path / INDEX} cannot be read as an index", "weight_map", "again")


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_stays_in_its_folder(tmp_path, absolute: bool) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere.safetensors"
    folder.mkdir()
    index = write_shards(folder)
    shard = index["weight_map"]["t4"]
    (folder / shard).rename(elsewhere)
    index["weight_map"]["t4"] = str(elsewhere) if absolute else "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, str(folder / INDEX), "elsewhere.safetensors, which is outside the folder", "copy")
    # A link is the user's own doing: the cache of Hugging Face is made of them.
    (folder / shard).symlink_to(elsewhere)
    index["weight_map"]["t4"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    assert WeightReader(folder).names() == sorted(tensors())


def test_an_index_that_its_shards_do_not_keep_is_named(tmp_path) -> None:
    index = write_shards(tmp_path)
    index["weight_map"]["t0"] = index["weight_map"]["t4"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, f"{tmp_path / index['weight_map']['t4']} has no tensor 't0'", INDEX, "again")


def test_a_folder_without_safetensors_says_what_it_holds(tmp_path) -> None:
    assert_refused(tmp_path, f"{tmp_path} holds neither {SINGLE} nor {INDEX}", "save_pretrained")
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, f"{tmp_path} holds only pytorch_model.bin", "save_pretrained")


def test_the_single_file_comes_before_an_index(tmp_path) -> None:
    make_llama(tmp_path)
    whole = load_file(tmp_path / SINGLE)
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    writer = WeightWriter(tmp_path / "shards", shapes, torch.float32, 10_000)
    writer.folder.mkdir()
    for name, tensor in whole.items():
        writer.add(name, tensor + 1)
    writer.close()
    for path in writer.folder.iterdir():
        path.rename(tmp_path / path.name)
    assert (tmp_path / INDEX).is_file()
    name = "model.norm.weight"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter(name)
    assert torch.equal(WeightReader(tmp_path).slices([name])[0][:], theirs)
    assert torch.equal(whole[name], theirs)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"whole": (4, 8)}, ""),
        ({"whole": (4, 8), "absent": (4,)}, "has no tensor 'absent', which the model's config.json asks for"),
        ({"whole": (2, 8)}, "whole has the shape (4, 8), and by config.json (2, 8)"),
        ({"whole": (32,)}, "whole has the shape (4, 8), and by config.json (32,)"),
        ({"int8": (4, 8)}, "int8 is stored as I8; training starts from"),
        ({"float8": (4, 8)}, "float8 is stored as F8_E4M3; training starts from"),
    ],
)
def test_tensors_are_checked_by_their_headers(tmp_path, expected: dict[str, Any], message: str) -> None:
    whole = torch.randn(4, 8)
    stored = {"whole": whole, "int8": whole.to(torch.int8), "float8": whole.to(torch.float8_e4m3fn)}
    save_file(stored, tmp_path / SINGLE)
    reader = WeightReader(tmp_path)
    if not message:
        reader.check(expected)
        return
    with pytest.raises(CheckpointError) as caught:
        reader.check(expected)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_stays_mapped_no_longer_than_its_slices(tmp_path) -> None:
    write_shards(tmp_path)
    reader = WeightReader(tmp_path)
    maps = Path("/proc/self/maps")
    mapped = lambda: str(tmp_path) in maps.read_text()  # noqa: E731
    slices = reader.slices(["t0", "t4"])
    values = [one[:].clone() for one in slices]
    assert [value.shape for value in values] == [(4, 8), (4, 8)]
    if maps.exists():  # Linux
        assert mapped()
        del slices
        assert not mapped()


def test_everything_but_the_weights_is_copied(tmp_path) -> None:
    source = make_llama(tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    copy_all_but_weights(source, target, torch.bfloat16)
    assert not list(target.glob("*.safetensors"))
    kept = {path.name for path in source.iterdir()} - {SINGLE}
    assert {path.name for path in target.iterdir()} == kept
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    save_file({k: v.bfloat16() for k, v in AutoModelForCausalLM.from_pretrained(source).state_dict().items()
               if k != "lm_head.weight"}, target / SINGLE, metadata={"format": "pt"})  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
