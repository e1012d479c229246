"""config.json to Architecture: sizes, rope as transformers computes it, refusals, and layout rules."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import architecture_of, check_layout, read_architecture

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 144,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        LLAMA3_ROPE,
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ],
)
def test_rope_is_that_of_transformers(rope: dict) -> None:
    config = LlamaConfig(**SMALL, rope_parameters=rope, max_position_embeddings=32768)
    theirs = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    assert torch.equal(torch.tensor(architecture_of(config).inverse_frequencies), theirs)


def test_sizes_and_parameter_count() -> None:
    for tied in (True, False):
        config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
        architecture = architecture_of(config)
        model = LlamaForCausalLM(config)
        assert architecture.num_parameters == sum(p.numel() for p in model.parameters())
        assert (architecture.num_kv_heads, architecture.head_dim, architecture.tied_embeddings) == (
            3,
            16,
            tied,
        )
    assert architecture.padded_vocab_size(128, 1) == 128
    assert architecture.padded_vocab_size(32, 3) == 192


def test_cost_counts_the_floating_point_operations_of_the_matrix_products() -> None:
    a = architecture_of(LlamaConfig(**SMALL))
    matrices = a.num_parameters - 2 * 99 * 144 - 144 * 13  # without embeddings and norms
    assert a.cost_model.per_token == 2 * matrices
    assert a.cost_model.per_attention_pair == 4 * 6 * 9 * 16
    assert a.cost_model.per_response_token == 2 * 144 * 99


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen2Config(), "model_type 'qwen2' is not supported; supported are llama, mistral"),
        (LlamaConfig(**SMALL, attention_bias=True), "attention_bias=True is not supported"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic' is not supported",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused(config: LlamaConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        architecture_of(config)


def test_layout_rules_name_the_fix() -> None:
    a = architecture_of(LlamaConfig(**SMALL, max_position_embeddings=512))
    check_layout(a, tp=3, pp=2, max_length=512)
    with pytest.raises(
        ConfigError,
        match=r"size=2 does not divide .* 9 attention heads and 3 key-value heads; use one of 1, 3",
    ):
        check_layout(a, tp=2, pp=1, max_length=512)
    with pytest.raises(
        ConfigError,
        match=r"pipeline_model_parallel_size=4 does not divide .* 6 layers; set .*to one of 1, 2, 3, 6",
    ):
        check_layout(a, tp=1, pp=4, max_length=512)
    check_layout(a, tp=1, pp=4, max_length=512, first_stage=1, last_stage=1)
    with pytest.raises(
        ConfigError, match=r"virtual_pipeline_model_parallel_size=2 does not divide the 3 layers"
    ):
        check_layout(a, tp=1, pp=2, vpp=2, max_length=512)
    check_layout(a, tp=1, pp=2, vpp=2, max_length=512, first_stage=4)
    with pytest.raises(ConfigError, match=r"max_length=513 is above the model's max_position_embeddings=512"):
        check_layout(a, tp=1, pp=1, max_length=513)


def test_a_sliding_window_is_a_limit_on_the_length() -> None:
    a = architecture_of(MistralConfig(**SMALL, sliding_window=128))
    check_layout(a, tp=1, pp=1, max_length=128)
    with pytest.raises(ConfigError, match="sliding_window=128"):
        check_layout(a, tp=1, pp=1, max_length=129)


def test_missing_folder(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config\.json in .*nowhere"):
        read_architecture(tmp_path / "nowhere")
