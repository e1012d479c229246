"""Safetensors folders: lazy reading, and a sentence for each broken folder."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mpo_megatron.conversion.hf_folder import SINGLE, WeightReader, copy_all_but_weights
from mpo_megatron.conversion.weight_writer import WeightWriter
from mpo_megatron.errors import CheckpointError
from tests.helpers.models import make_llama


def tensors() -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.randn(4, 8) for i in range(5)}  # 128 bytes each


@pytest.fixture
def sharded(tmp_path):
    """A folder of five tensors in three shards."""
    source = tensors()
    writer = WeightWriter(tmp_path, {name: t.shape for name, t in source.items()}, torch.float32, 256)
    for name, tensor in source.items():
        writer.add(name, tensor)
    writer.close()
    return tmp_path


def test_a_missing_shard_is_named(sharded) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        WeightReader(sharded)


def test_a_truncated_file_is_named(tmp_path) -> None:
    save_file(tensors(), tmp_path / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        WeightReader(tmp_path)


def test_no_weights_and_no_such_tensor(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        WeightReader(tmp_path)
    save_file(tensors(), tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="has no tensor 'missing'"):
        WeightReader(tmp_path).lazy("missing")


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
