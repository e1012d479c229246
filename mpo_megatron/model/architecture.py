"""What a Hugging Face config.json says of a model, in one record, and the checks that need it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.model.stages import check_stages
from mpo_megatron.pretrained import load_config
from mpo_megatron.scheduling.plan import CostModel


@dataclass(frozen=True)
class Family:
    """What a decoder block has beside Llama's: pre-norm RMSNorm, rotary GQA attention, SwiGLU, no biases."""

    qkv_bias: bool = False  # on queries, keys and values; none on the output projection
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, before they are rotated
    experts: bool = False  # many SwiGLUs in the place of one, of which a router takes a few for each token


# By model_type in config.json. `conversion.names` has the tensors' names.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, experts=True),
}

# Of any size in a config: what a 32-bit index reaches, and a formula in floating point takes.
_LARGEST = 2**31 - 1

# What a config must say, where it says anything. The last two: every layer has experts.
_REQUIRED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes to the `per_token` of them with the highest logits of a linear router.

    Their outputs are weighted with the softmax over the logits of the token's experts (`normalized`), or of all.
    """

    number: int
    per_token: int
    normalized: bool


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama-like decoder.

    `ffn_hidden_size` is that of each expert where there are `experts`, which then are in every layer.
    `inverse_frequencies` are RoPE's, [head_dim / 2], rope scaling included; `attention_factor` is what yarn multiplies
    the rotated queries and the rotated keys with.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    tied_embeddings: bool
    sliding_window: int | None
    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    experts: Experts | None = None

    @property
    def block(self) -> Family:
        """What the family's decoder block has beside Llama's."""
        return FAMILIES[self.family]

    @property
    def softmax_scale(self) -> float:
        """What attention scores q k are multiplied with: 1 / sqrt(head_dim), and yarn's factor for both q and k."""
        return self.attention_factor**2 / math.sqrt(self.head_dim)

    def padded_vocab_size(self, multiple: int, tp: int) -> int:
        """The vocabulary rounded up so that each tensor-parallel rank holds a multiple of `multiple` rows."""
        unit = multiple * tp
        return -(-self.vocab_size // unit) * unit

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that weights have, by the letters of `conversion.names`."""
        return {
            "H": self.hidden_size,
            "Q": self.num_heads * self.head_dim,
            "K": self.num_kv_heads * self.head_dim,
            "D": self.head_dim,
            "F": self.ffn_hidden_size,
            "E": 0 if self.experts is None else self.experts.number,
            "V": self.vocab_size,
        }

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        experts = 1 if self.experts is None else self.experts.number
        per_layer = self._matrix_parameters(experts) + self._vector_parameters
        return embeddings + self.num_layers * per_layer + self.hidden_size

    def _matrix_parameters(self, experts: int) -> int:
        """Parameters of one layer's matrices, with so many of its experts; a dense layer counts as one expert."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        router = 0 if self.experts is None else self.hidden_size * self.experts.number
        return attention + router + experts * 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def _vector_parameters(self) -> int:
        """Parameters of one layer's norms and biases."""
        biases = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.block.qkv_bias else 0
        qk_norms = 2 * self.head_dim if self.block.qk_norm else 0
        return 2 * self.hidden_size + biases + qk_norms

    @property
    def cost_model(self) -> CostModel:
        """Forward FLOPs by tokens, attention pairs and response tokens (the head runs on response tokens only).

        Of the experts, those count that a token goes to.
        """
        experts = 1 if self.experts is None else self.experts.per_token
        return CostModel(
            per_token=2.0 * self.num_layers * self._matrix_parameters(experts),
            per_attention_pair=4.0 * self.num_layers * self.num_heads * self.head_dim,
            per_response_token=2.0 * self.hidden_size * self.vocab_size,
        )


def read_architecture(folder: str | Path) -> Architecture:
    """Read `config.json` of a Hugging Face folder.

    Raises:
        ConfigError: no such folder or config, a family or a feature that is not supported.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"there is no config.json in {path.absolute()}; give the folder of a Hugging Face model (config.json, "
            "*.safetensors, tokenizer files)"
        )
    return architecture_of(load_config(path), str(path))


def read_config_file(file: Path) -> Architecture:
    """Read a config.json by whatever name.

    Raises:
        ConfigError: it cannot be read, or says what is not supported.
    """
    return architecture_of(load_config(file, shown=file), str(file))


def architecture_of(config: Any, where: str = "config") -> Architecture:
    """The Architecture of a transformers config object; `where` names it in errors.

    Raises:
        ConfigError: a family or a feature that is not supported, or values that make no model.
    """
    try:
        found = _architecture_of(config, where)
    except UserError:
        raise
    except Exception as error:  # whatever transformers' formulas make of values of other types
        raise ConfigError(
            f"{where}: the values in config.json make no model ({type(error).__name__}: {error})"
        ) from error
    _check_values(found, where)
    return found


def _check_values(found: Architecture, where: str) -> None:
    sizes = {
        "num_hidden_layers": found.num_layers,
        "hidden_size": found.hidden_size,
        "intermediate_size": found.ffn_hidden_size,
        "num_attention_heads": found.num_heads,
        "num_key_value_heads": found.num_kv_heads,
        "head_dim": found.head_dim,
        "vocab_size": found.vocab_size,
        "max_position_embeddings": found.max_positions,
    }
    if found.experts is not None:
        sizes |= {"num_experts": found.experts.number, "num_experts_per_tok": found.experts.per_token}
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ConfigError(
                f"{where}: {name}={value!r} in config.json must be a whole number from 1 to {_LARGEST:,}"
            )
    if found.head_dim % 2:
        raise ConfigError(
            f"{where}: head_dim={found.head_dim} in config.json must be even, for rotary embeddings"
        )
    if found.num_heads % found.num_kv_heads:
        raise ConfigError(
            f"{where}: num_attention_heads={found.num_heads} in config.json must be a multiple of "
            f"num_key_value_heads={found.num_kv_heads}"
        )
    if type(found.norm_epsilon) not in (int, float) or not 0 <= found.norm_epsilon < math.inf:
        raise ConfigError(
            f"{where}: rms_norm_eps={found.norm_epsilon!r} in config.json must be a number, 0 or more"
        )
    window = found.sliding_window
    if window is not None and (type(window) is not int or window < 1):
        raise ConfigError(
            f"{where}: sliding_window={window!r} in config.json must be a whole number, 1 or more"
        )
    if not all(math.isfinite(value) for value in (*found.inverse_frequencies, found.attention_factor)):
        raise ConfigError(f"{where}: the rotary embedding of config.json has frequencies that are not finite")


def _architecture_of(config: Any, where: str) -> Architecture:
    family = config.model_type
    if family not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{where}: the weights are quantised (quantization_config in config.json); training starts from float32, "
            "bfloat16 or float16 weights, so dequantise them first"
        )
    for name, wanted in _REQUIRED.items():
        value = getattr(config, name, wanted)
        if value != wanted:
            raise ConfigError(f"{where}: {name}={value!r} is not supported; it must be {wanted!r}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inverse_frequencies, attention_factor = _rope(config, head_dim, where)
    experts = _experts(config, where) if FAMILIES[family].experts else None
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size if experts is None else config.moe_intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        sliding_window=getattr(config, "sliding_window", None),
        inverse_frequencies=inverse_frequencies,
        attention_factor=attention_factor,
        experts=experts,
    )


def _experts(config: Any, where: str) -> Experts:
    experts = Experts(config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
    if experts.per_token == 1 and experts.normalized:
        raise ConfigError(
            f"{where}: norm_topk_prob=True with num_experts_per_tok=1 weights every token's one expert with 1, so that "
            "the router has no gradient; it must be False there"
        )
    return experts


def _rope(config: Any, head_dim: int, where: str) -> tuple[tuple[float, ...], float]:
    """RoPE's inverse frequencies and attention factor as transformers computes them: both sides rotate alike."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope_parameters(config)
    kind = rope.get("rope_type", "default")
    attention_factor = 1.0
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inverse = 1.0 / (rope["rope_theta"] ** exponents)
    elif kind in ("linear", "llama3", "yarn"):
        inverse, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    else:
        raise ConfigError(
            f"{where}: rope_type {kind!r} is not supported; supported are default, linear, llama3 and yarn"
        )
    return tuple(inverse.tolist()), float(attention_factor)


def _rope_parameters(config: Any) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of transformers 4, as one dictionary."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters:
        return dict(parameters)
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    return {"rope_theta": config.rope_theta, **scaling}


def check_layout(
    architecture: Architecture,
    *,
    tp: int,
    pp: int,
    max_length: int,
    vpp: int = 1,
    ep: int = 1,
    first_stage: int | None = None,
    last_stage: int | None = None,
    sequence_parallel: bool = True,
) -> None:
    """Check that the model can be cut as asked and is used within what it was made for.

    Args:
        first_stage: layers of the first pipeline stage, None: as many as the others.
        last_stage: layers of the last.
        sequence_parallel: whether tensor-parallel ranks share the sequence outside attention and feed-forward parts.

    Raises:
        ConfigError: a size does not divide, or `data.max_length` is above what the model attends to.
    """
    if architecture.num_heads % tp or architecture.num_kv_heads % tp:
        fitting = [n for n in range(1, architecture.num_kv_heads + 1) if not architecture.num_kv_heads % n]
        fitting = [n for n in fitting if not architecture.num_heads % n]
        raise ConfigError(
            f"model.tensor_model_parallel_size={tp} does not divide the model's {architecture.num_heads} attention "
            f"heads and {architecture.num_kv_heads} key-value heads; use one of {', '.join(map(str, fitting))}"
        )
    if architecture.ffn_hidden_size % tp:
        raise ConfigError(
            f"model.tensor_model_parallel_size={tp} does not divide the model's feed-forward size "
            f"{architecture.ffn_hidden_size}; use a divisor of it"
        )
    _check_experts(architecture, tp, ep, sequence_parallel)
    check_stages(architecture.num_layers, pp, vpp, first_stage, last_stage)
    for limit, name in (
        (architecture.max_positions, "max_position_embeddings"),
        (architecture.sliding_window, "sliding_window"),
    ):
        if limit is not None and max_length > limit:
            raise ConfigError(
                f"model.data.max_length={max_length} is above the model's {name}={limit}; set it to {limit} or less"
            )


def _check_experts(architecture: Architecture, tp: int, ep: int, sequence_parallel: bool) -> None:
    experts = architecture.experts
    if experts is None:
        if ep > 1:
            raise ConfigError(
                f"model.expert_model_parallel_size={ep}: the model has no experts to share among ranks; "
                "remove it or set it to 1"
            )
        return
    if experts.number % ep:
        fitting = [n for n in range(1, experts.number + 1) if not experts.number % n]
        raise ConfigError(
            f"model.expert_model_parallel_size={ep} does not divide the {experts.number} experts of a layer; "
            f"use one of {', '.join(map(str, fitting))}"
        )
    if tp > 1 and not sequence_parallel:
        raise ConfigError(
            f"model.sequence_parallel=false: over tensor_model_parallel_size={tp} ranks Megatron trains a mixture of "
            "experts with sequence parallelism alone; remove model.sequence_parallel or set it to true"
        )
