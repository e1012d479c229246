"""Small random models and groups, made on the spot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mpo_megatron.data import TokenizedGroup
from tests.helpers.tokenizers import make_tokenizer


def make_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random Llama (4 layers, 4 heads over 2 key-value heads, an odd vocabulary) with a tokenizer."""
    tokenizer = make_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # far from uniform predictions, so that a wrong position or mask shows
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes}), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_groups(
    sizes: Sequence[int], vocab_size: int, *, seed: int = 0, longest: int = 24
) -> list[TokenizedGroup]:
    """One random ragged group for each number of responses in `sizes`."""
    random = np.random.default_rng(seed)
    groups = []
    for number, n in enumerate(sizes):
        scores = random.normal(size=n)
        groups.append(
            TokenizedGroup(
                id=str(number),
                prompt_ids=random.integers(0, vocab_size, random.integers(1, longest)),
                response_ids=[random.integers(0, vocab_size, random.integers(1, longest)) for _ in range(n)],
                scores=scores,
                preferred=scores > scores.mean(),
            )
        )
    return groups


def hugging_face_logps(
    folder: Path, groups: Sequence[TokenizedGroup], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[R] log-probabilities of the groups' responses by transformers, one prompt and response at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    found = []
    with torch.no_grad():
        for group in groups:
            for response in group.response_ids:
                ids = torch.as_tensor(np.concatenate([group.prompt_ids, response]))[None]
                # In float64: a float32 log-softmax over 49,152 logits on a CPU is off by some 2e-5 a token, one way.
                logps = model(ids).logits[0].double().log_softmax(-1)
                first = len(group.prompt_ids)
                found.append(logps[first - 1 : -1].gather(1, ids[0, first:, None]).sum())
    return torch.stack(found).float()
