"""Which Hugging Face tensors make up which Megatron parameter.

`{i}` is the layer's number from 0 over the whole model. Megatron's norms have two names: their own under the
local layer spec, and inside the linear layer that they are fused with under Transformer Engine's; checkpoints have the
latter under either, so it stands last.

Sizes in the table: H hidden size, Q and K rows of the query and of the key (and value) projection, D head size, F
feed-forward size, V vocabulary; see `Architecture.sizes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mpo_megatron.conversion import transforms
from mpo_megatron.model.architecture import Architecture, Family

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: its possible names, the Hugging Face tensors behind it, and their relation."""

    megatron: tuple[str, ...]
    hugging_face: tuple[str, ...]
    kind: transforms.Kind
    sizes: tuple[str, ...]  # of each Hugging Face tensor, such as "FH"

    @property
    def stored(self) -> tuple[str, int | None]:
        """(name in a distributed checkpoint, layer): Megatron stacks the layers there."""
        name = self.megatron[-1]
        if not name.startswith(_LAYERS):
            return name, None
        layer, rest = name.removeprefix(_LAYERS).split(".", 1)
        return _LAYERS + rest, int(layer)

    def shapes(self, architecture: Architecture) -> dict[str, torch.Size]:
        """Of the Hugging Face tensors, by name."""
        sizes = architecture.sizes
        shapes = [torch.Size(sizes[letter] for letter in letters) for letters in self.sizes]
        return dict(zip(self.hugging_face, shapes, strict=True))


EMBEDDING = Entry(
    ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), transforms.VOCABULARY, ("VH",)
)
FINAL_NORM = Entry(("decoder.final_layernorm.weight",), ("model.norm.weight",), transforms.REPLICATED, ("H",))
OUTPUT = Entry(("output_layer.weight",), ("lm_head.weight",), transforms.VOCABULARY, ("VH",))
# With tied embeddings the last pipeline stage holds a copy of the embedding under the output layer's name.
TIED_OUTPUT = replace(EMBEDDING, megatron=OUTPUT.megatron)

_LAYER = _LAYERS + "{i}."
_HF_LAYER = "model.layers.{i}."
LLAMA_LAYER = (
    Entry(
        (_LAYER + "input_layernorm.weight", _LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        (_HF_LAYER + "input_layernorm.weight",),
        transforms.REPLICATED,
        ("H",),
    ),
    Entry(
        (_LAYER + "self_attention.linear_qkv.weight",),
        tuple(_HF_LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
        transforms.QKV,
        ("QH", "KH", "KH"),
    ),
    Entry(
        (_LAYER + "self_attention.linear_proj.weight",),
        (_HF_LAYER + "self_attn.o_proj.weight",),
        transforms.COLUMNS,
        ("HQ",),
    ),
    Entry(
        (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (_HF_LAYER + "post_attention_layernorm.weight",),
        transforms.REPLICATED,
        ("H",),
    ),
    Entry(
        (_LAYER + "mlp.linear_fc1.weight",),
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        transforms.GATE_UP,
        ("FH", "FH"),
    ),
    Entry(
        (_LAYER + "mlp.linear_fc2.weight",),
        (_HF_LAYER + "mlp.down_proj.weight",),
        transforms.COLUMNS,
        ("HF",),
    ),
)
QKV_BIAS = (
    Entry(
        (_LAYER + "self_attention.linear_qkv.bias",),
        tuple(_HF_LAYER + f"self_attn.{name}_proj.bias" for name in "qkv"),
        transforms.QKV,
        ("Q", "K", "K"),
    ),
)
QK_NORM = tuple(
    Entry(
        (_LAYER + f"self_attention.{name}_layernorm.weight",),
        (_HF_LAYER + f"self_attn.{name}_norm.weight",),
        transforms.REPLICATED,
        ("D",),
    )
    for name in "qk"
)


def layer_entries(block: Family) -> tuple[Entry, ...]:
    """The parameters of one layer of a family."""
    return LLAMA_LAYER + (QKV_BIAS if block.qkv_bias else ()) + (QK_NORM if block.qk_norm else ())


def entries(architecture: Architecture) -> Iterator[Entry]:
    """The parameters of the whole model in order, layer numbers filled in; each Hugging Face tensor is in one."""
    yield EMBEDDING
    for i in range(architecture.num_layers):
        for entry in layer_entries(architecture.block):
            yield replace(
                entry,
                megatron=tuple(name.format(i=i) for name in entry.megatron),
                hugging_face=tuple(name.format(i=i) for name in entry.hugging_face),
            )
    yield FINAL_NORM
    if not architecture.tied_embeddings:
        yield OUTPUT


def by_megatron_name(architecture: Architecture) -> dict[str, Entry]:
    """Every Megatron name, of either layer spec, to its entry; the tied output layer's copy included."""
    table = {name: entry for entry in entries(architecture) for name in entry.megatron}
    table.setdefault("output_layer.weight", TIED_OUTPUT)
    return table
