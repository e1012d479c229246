"""config.json to Architecture: sizes, rope as transformers computes it, refusals, and layout rules."""

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Experts, architecture_of, check_layout, read_architecture

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 144,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
}
MOE = partial(
    Qwen3MoeConfig,
    **SMALL,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        LLAMA3_ROPE,
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        YARN,
        {**YARN, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7, "truncate": False},
    ],
)
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_rope_is_that_of_transformers(kind: type, rope: dict) -> None:
    config = kind(**SMALL, rope_parameters=dict(rope), max_position_embeddings=32768)
    theirs = AutoModelForCausalLM.from_config(config).model.rotary_emb
    ours = architecture_of(config)
    assert torch.equal(torch.tensor(ours.inverse_frequencies), theirs.inv_freq)
    assert ours.attention_factor == theirs.attention_scaling
    assert ours.softmax_scale == pytest.approx(theirs.attention_scaling**2 / 4)  # head_dim is 16


def test_yarn_scales_scores_by_the_square_of_its_factor() -> None:
    """The factor of the paper, 0.1 ln(factor) + 1, unless the config gives another."""
    a = architecture_of(LlamaConfig(**SMALL, rope_parameters=dict(YARN), max_position_embeddings=32768))
    assert a.softmax_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2 / 4)
    assert architecture_of(LlamaConfig(**SMALL)).softmax_scale == 1 / 4


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, MOE])
def test_sizes_and_parameter_count(kind: Any) -> None:
    for tied in (True, False):
        config = kind(**SMALL, tie_word_embeddings=tied)
        architecture = architecture_of(config)
        model = AutoModelForCausalLM.from_config(config)
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
    for kind in (Qwen2Config, Qwen3Config):  # biases and norms of heads are no matrix products
        assert architecture_of(kind(**SMALL)).cost_model == a.cost_model
    assert a.cost_model.per_token == 2 * matrices
    assert a.cost_model.per_attention_pair == 4 * 6 * 9 * 16
    assert a.cost_model.per_response_token == 2 * 144 * 99


def test_cost_counts_the_experts_that_a_token_goes_to() -> None:
    dense = architecture_of(LlamaConfig(**SMALL))
    a = architecture_of(MOE())
    matrices = 2 * 3 * 144 * 24 + 5 * 144 - 3 * 144 * 96  # two experts and the router, not the dense layer's
    assert a.cost_model.per_token - dense.cost_model.per_token == 2 * 6 * matrices
    assert a.cost_model.per_attention_pair == dense.cost_model.per_attention_pair
    assert a.experts == Experts(number=5, per_token=2, normalized=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GemmaConfig(), "model_type 'gemma' is not supported; supported are llama, mistral, qwen2, qwen3"),
        (LlamaConfig(**SMALL, attention_bias=True), "attention_bias=True is not supported"),
        (Qwen3Config(**SMALL, attention_bias=True), "attention_bias=True is not supported"),
        (Qwen2Config(**SMALL, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic' is not supported",
        ),
        (MOE(decoder_sparse_step=2), "decoder_sparse_step=2 is not supported; it must be 1"),
        (MOE(mlp_only_layers=[0]), "mlp_only_layers=[0] is not supported; it must be []"),
        (MOE(num_experts_per_tok=1), "so that the router has no gradient; it must be False there"),
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


def test_expert_parallelism_divides_the_experts() -> None:
    dense, moe = architecture_of(LlamaConfig(**SMALL)), architecture_of(MOE())
    check_layout(moe, tp=1, pp=1, ep=5, max_length=512)
    with pytest.raises(
        ConfigError, match=r"size=2 does not divide the 5 experts of a layer; use one of 1, 5$"
    ):
        check_layout(moe, tp=1, pp=1, ep=2, max_length=512)
    with pytest.raises(ConfigError, match=r"size=2: the model has no experts .*; remove it or set it to 1$"):
        check_layout(dense, tp=1, pp=1, ep=2, max_length=512)


def test_experts_over_tensor_parallel_ranks_need_sequence_parallelism() -> None:
    dense, moe = architecture_of(LlamaConfig(**SMALL)), architecture_of(MOE())
    for a, tp in ((dense, 3), (moe, 1)):
        check_layout(a, tp=tp, pp=1, max_length=512, sequence_parallel=False)
    check_layout(moe, tp=3, pp=1, max_length=512)
    with pytest.raises(
        ConfigError, match=r"sequence_parallel=false: over tensor_model_parallel_size=3 ranks"
    ):
        check_layout(moe, tp=3, pp=1, max_length=512, sequence_parallel=False)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=128),
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=128, max_window_layers=3),
        Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=128, max_window_layers=3),
    ],
)
def test_a_sliding_window_is_a_limit_on_the_length(config: MistralConfig) -> None:
    a = architecture_of(config)
    check_layout(a, tp=1, pp=1, max_length=128)
    with pytest.raises(ConfigError, match="sliding_window=128"):
        check_layout(a, tp=1, pp=1, max_length=129)


def test_a_window_that_is_not_used_is_none() -> None:
    for kind in (Qwen2Config, Qwen3Config):
        a = architecture_of(kind(**SMALL, use_sliding_window=False, sliding_window=128))
        check_layout(a, tp=1, pp=1, max_length=32768)


def test_missing_folder(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config\.json in .*nowhere"):
        read_architecture(tmp_path / "nowhere")
