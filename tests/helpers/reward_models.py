"""Small random reward models of each kind, in real transformers classes, made on the spot."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from mpo_megatron.rollout.armo_rm import ArmoRM
from mpo_megatron.rollout.pair_ranker import FIRST, SECOND, SOURCE, DebertaV2PairRM
from tests.helpers.tokenizers import CHATML, make_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # Large, so that scores differ.
    "initializer_range": 0.3,
}
# As Llama 3.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def make_classifier(
    folder: Path,
    family: str = "llama",
    *,
    chat_template: str | None = CHATML,
    padding: str | None = None,
    **changes: Any,
) -> Path:
    """Sequence classification of a family, with one output unless `num_labels` says otherwise.

    Args:
        padding: the token that config.json names as padding, if any.
    """
    tokenizer = make_tokenizer(chat_template)
    sizes: dict[str, Any] = {
        **SIZES,
        "vocab_size": len(tokenizer) + 3,
        "num_labels": 1,
        "pad_token_id": None if padding is None else tokenizer.convert_tokens_to_ids(padding),
    }
    if family in ("llama", "gemma"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_armo_rm(folder: Path, *, chat_template: str = LLAMA3) -> Path:
    """ArmoRM with five objectives; its config.json has the names that ArmoRM's own has."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]}
    )
    config = AutoConfig.for_model(
        "llama",
        **SIZES,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        num_objectives=5,
        gating_temperature=2,
        gating_hidden_dim=16,
        gating_n_hidden=3,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = ArmoRM(config)
    with torch.no_grad():
        model.reward_transform_matrix.copy_(torch.eye(5) + 0.3 * torch.randn(5, 5))
        model.gating.logit_scale.fill_(1.5)
    model.save_pretrained(folder)
    path = folder / "config.json"
    names = {
        "architectures": [ArmoRM.ARCHITECTURE],
        "auto_map": {"AutoModel": "modeling_custom." + ArmoRM.ARCHITECTURE},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    tokenizer.save_pretrained(folder)
    return folder


def make_pair_ranker(folder: Path) -> Path:
    """PairRM with two tasks."""
    tokenizer = make_tokenizer(None, adds_bos=True, adds_eos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [SOURCE, FIRST, SECOND]})
    tokenizer.pad_token = "</s>"
    marks = tokenizer.convert_tokens_to_ids([SOURCE, FIRST, SECOND])
    config = AutoConfig.for_model(
        "deberta-v2",
        **SIZES,
        vocab_size=len(tokenizer),
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        n_tasks=2,
        drop_out=0.05,
        source_prefix_id=marks[0],
        cand1_prefix_id=marks[1],
        cand2_prefix_id=marks[2],
    )
    torch.manual_seed(0)
    DebertaV2PairRM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer
