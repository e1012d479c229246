"""Small random models and groups, made on the spot."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from mpo_megatron.data import TokenizedGroup
from mpo_megatron.model.architecture import FAMILIES
from tests.helpers.tokenizers import make_tokenizer


def make_model(
    folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a random model (4 layers, 4 heads over 2 key-value heads, an odd vocabulary) with a tokenizer.

    Args:
        family: `model_type` of the transformers config that `changes` goes to.
    """
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
    if FAMILIES[family].experts:
        sizes |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # which start at one and zero
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved_parameters(model: Any) -> dict[str, Tensor]:
    """A transformers model's parameters by their names in its files, where each expert's matrices are tensors.

    In memory transformers holds all experts of a layer in one. Tied weights are there once.
    """
    return revert_weight_conversion(model, dict(model.named_parameters()))


def make_llama(folder: Path, **changes: Any) -> Path:
    """`make_model` of the family that most tests need."""
    return make_model(folder, "llama", **changes)


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
    """[R] log-probabilities of the groups' responses by transformers, one prompt and response at a time, in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    if dtype == torch.float64:
        compute_in_float64(model)
    found = []
    with torch.no_grad():
        for group in groups:
            for response in group.response_ids:
                ids = torch.as_tensor(np.concatenate([group.prompt_ids, response]))[None]
                # In float64: a float32 log-softmax over 49,152 logits on a CPU is off by some 2e-5 a token, one way.
                logps = model(ids).logits[0].double().log_softmax(-1)
                first = len(group.prompt_ids)
                found.append(logps[first - 1 : -1].gather(1, ids[0, first:, None]).sum())
    return torch.stack(found).to(dtype)


def compute_in_float64(model: torch.nn.Module) -> None:
    """Have a transformers model of float64 weights compute in float64 throughout, in place.

    transformers computes three things in float32 whatever the weights are, each an error of some 1e-7 that is no part
    of the model: RMSNorm, the softmax of a router, and the product of yarn's factor with the cosines and sines. All are
    put in its dtype here. The angles, and their cosines and sines, stay in float32: so they are in Megatron too.
    """
    norms = rotations = 0
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
            norms += 1
        elif kind.endswith("TopKRouter"):
            module.forward = partial(_route, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = partial(_cosines_and_sines, module)
            rotations += 1
    assert norms > 0, "no RMSNorm was found"
    assert rotations == 1, f"{rotations} rotary embeddings were found"


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def _route(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = x.reshape(-1, router.hidden_dim) @ router.weight.T
    weights, experts = logits.softmax(-1).topk(router.top_k)
    if router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, experts


def _cosines_and_sines(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    assert rotary.inv_freq.dtype == torch.float32
    angles = position_ids[..., None].float() * rotary.inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    cosines, sines = (
        values.to(x.dtype) * rotary.attention_scaling for values in (angles.cos(), angles.sin())
    )
    return cosines, sines
