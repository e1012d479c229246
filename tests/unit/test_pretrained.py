"""A Hugging Face folder through transformers: the whole model, or one sentence about what is wrong with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mpo_megatron.errors import CheckpointError, ConfigError
from mpo_megatron.pretrained import load_config, load_model, load_tokenizer
from mpo_megatron.rollout.armo_rm import ArmoRM
from mpo_megatron.rollout.pair_ranker import DebertaV2PairRM
from mpo_megatron.rollout.reward_models import RewardModel
from tests.helpers.fuzzing import TRIED, check_message, damaged, tries
from tests.helpers.models import make_model
from tests.helpers.reward_models import make_armo_rm, make_classifier, make_pair_ranker

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


pytestmark = pytest.mark.usefixtures("inputs_are_counted")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", "llama", num_hidden_layers=2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    return load_model(kind, folder, dtype=torch.float32, device="cpu")


def remove(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_a_whole_folder(whole: Path) -> None:
    model = load(whole)
    assert not model.training
    stored = load_file(whole / WEIGHTS)
    assert stored.keys() <= model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stored.items())


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    remove(folder, UP)
    with pytest.raises(CheckpointError, match=f"lacks {UP}, which LlamaForCausalLM has; copy or download"):
        load(folder)


def test_weights_of_other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.weight and 5 more in the shape \[32, 48\], where"):
        load(folder)


@pytest.mark.parametrize(
    ("make", "kind", "head"),
    [
        (make_classifier, AutoModelForSequenceClassification, "score.weight"),
        (make_armo_rm, ArmoRM, "gating.logit_scale"),
        (make_pair_ranker, DebertaV2PairRM, "head_layer.4.bias"),
    ],
)
def test_a_reward_model_without_its_head(make: Any, kind: Any, head: str, tmp_path: Path) -> None:
    made = make(tmp_path / "model")
    load(made, kind)
    remove(made, head)
    with pytest.raises(CheckpointError, match=f"lacks {head}"):
        load(made, kind)


def test_a_language_model_does_not_score(folder: Path) -> None:
    """Called a classifier by its config.json, it lacks the head."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"lacks score\.weight, which LlamaForSequenceClassification has"
    ):
        RewardModel(str(folder), dtype="float32", device="cpu", batch_tokens=100)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", WEIGHTS])
def test_a_file_cut_in_half(file: str, folder: Path) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    sentence = {
        "tokenizer.json": rf"no tokenizer can be loaded from {folder} \(.*tokenizer.json, .* must be there",
        "config.json": rf"{folder}/config.json cannot be read \(",
        WEIGHTS: rf"no model can be loaded from {folder} \(.*copy or download",
    }[file]
    with pytest.raises((CheckpointError, ConfigError), match=sentence):
        load_config(folder), load_tokenizer(folder), load(folder)


@tries(60)
@given(data=st.data())
def test_damaged_weights(data: Any, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = (whole / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    pieces = (b"{", b'"', b"F32", b"BF16", b"[0,1]", b"\xff" * 8)
    spoilt = data.draw(damaged(content, pieces, within=header) | damaged(content) | st.binary(max_size=60))
    (folder / WEIGHTS).write_bytes(spoilt)
    try:
        load(folder)
        TRIED["models taken"] += 1
    except CheckpointError as error:
        check_message(error)
        TRIED["models refused"] += 1
