"""Whatever lies in a Hugging Face folder: a model or one sentence with the place, never anything else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_megatron.conversion.hf_folder import INDEX, SINGLE, WeightReader
from mpo_megatron.errors import CheckpointError, ConfigError
from mpo_megatron.model.architecture import Architecture, check_layout, read_architecture
from mpo_megatron.pretrained import load_tokenizer
from tests.helpers.fuzzing import SCALARS, TEXT, TRIED, check_message, damaged, tries
from tests.helpers.models import make_model

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral")


pytestmark = pytest.mark.usefixtures("inputs_are_counted")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {family: make_model(base / family, family, num_hidden_layers=2) for family in FAMILIES}


KEYS = st.sampled_from([
    "model_type", "architectures", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "intermediate_size", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "tie_word_embeddings", "sliding_window", "rope_parameters", "rope_scaling", "rope_theta", "attention_bias",
    "mlp_bias", "quantization_config", "torch_dtype", "dtype", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "use_sliding_window", "layer_types", "auto_map",
])  # fmt: skip
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "attention_factor"]),
    SCALARS | st.sampled_from(["llama3", "yarn", "linear", "dynamic", "default", 8.0, 32]), max_size=6,
)  # fmt: skip
VALUES = SCALARS | ROPE | st.lists(SCALARS, max_size=3)
REMOVE = object()


def check_architecture(folder: Path) -> None:
    """It is refused by name, or is one whose every number can be computed with."""
    try:
        architecture = read_architecture(folder)
        assert isinstance(architecture, Architecture)
        check_layout(architecture, tp=1, pp=1, max_length=1)
    except ConfigError as error:
        check_message(error)
        TRIED["configurations refused"] += 1
        return
    assert architecture.cost_model.forward(10, 10, 10) > 0
    assert architecture.head_dim > 0 < architecture.num_layers
    assert len(architecture.inverse_frequencies) == architecture.head_dim // 2
    TRIED["configurations taken"] += 1


@tries(250)
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.dictionaries(KEYS, VALUES | st.just(REMOVE), min_size=1, max_size=3),
)
def test_changed_keys_of_config_json(
    family: str, changes: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[family] / "config.json").read_text())
    for key, value in changes.items():
        if value is REMOVE:
            config.pop(key, None)
        else:
            config[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_architecture(tmp_path)


@tries(80)
@given(data=st.data())
def test_damaged_config_json(data: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = (folders["llama"] / "config.json").read_bytes()
    pieces = (b"{", b"[", b'"', b",", b"null", b"1e999", b"-1", b"\\ud800")
    (tmp_path / "config.json").write_bytes(data.draw(damaged(whole, pieces) | st.binary(max_size=60)))
    check_architecture(tmp_path)


def check_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    try:
        reader = WeightReader(folder)
        reader.check(shapes)
        for part in reader.slices(list(shapes)):
            part[:]
    except CheckpointError as error:
        check_message(error, str(folder))
        TRIED["weights refused"] += 1
        return
    TRIED["weights taken"] += 1


@tries(120)
@given(data=st.data())
def test_damaged_weights(data: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = (folders["llama"] / SINGLE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    pieces = (b"{", b'"', b"F32", b"BF16", b"[0,1]", b"\xff" * 8)
    (tmp_path / SINGLE).write_bytes(data.draw(damaged(whole, pieces, within=header) | st.binary(max_size=60)))
    reader = WeightReader(folders["llama"])
    check_weights(tmp_path, {name: reader.stored(name).shape for name in reader.names()})


@tries(120)
@given(
    index=st.one_of(
        VALUES,
        st.fixed_dictionaries({"weight_map": VALUES | st.dictionaries(TEXT, VALUES, max_size=3)}),
        st.fixed_dictionaries({"weight_map": st.dictionaries(
            st.sampled_from(["model.norm.weight", "lm_head.weight"]),
            st.sampled_from(["a.safetensors", "../a.safetensors", "/etc/passwd", "", ".", "b\0", "a" * 300]) | TEXT,
        )}),
    )
)  # fmt: skip
def test_any_index(index: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copyfile(folders["llama"] / SINGLE, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    check_weights(tmp_path, {"model.norm.weight": (64,)})


@tries(60)
@given(data=st.data())
def test_damaged_tokenizer(data: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folders["llama"] / name, tmp_path / name)
    spoilt = tmp_path / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    pieces = (b"{", b"[", b'"', b",", b"null", b"-1")
    spoilt.write_bytes(data.draw(damaged(spoilt.read_bytes(), pieces) | st.binary(max_size=60)))
    try:
        load_tokenizer(tmp_path)
        TRIED["tokenizers taken"] += 1
    except ConfigError as error:
        check_message(error)
        TRIED["tokenizers refused"] += 1
