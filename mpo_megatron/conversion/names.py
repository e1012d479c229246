"""Which Hugging Face tensors make up which Megatron parameter.

`{i}` is the layer's number from 0 over the whole model, `{e}` that of an expert over all of the layer's, on whatever
rank it is. Megatron's norms have two names: their own under the local layer spec, and inside the linear layer that they
are fused with under Transformer Engine's; checkpoints have the latter under either, so it stands last.

Sizes in the table: H hidden size, Q and K rows of the query and of the key (and value) projection, D head size, F
feed-forward size (of an expert), E experts, V vocabulary; see `Architecture.sizes`.
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
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """(name in a distributed checkpoint, place in it): Megatron stacks layers there, and in each the experts."""
        parts = self.megatron[-1].split(".")
        place = tuple(int(part) for part in parts if part.isdigit())
        name = ".".join(part for part in parts if not part.isdigit())
        return name.replace("local_experts", "experts"), place

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
ATTENTION = (
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


def _swiglu(megatron: str, hugging_face: str) -> tuple[Entry, ...]:
    """A feed-forward part, or an expert, by its name on either side."""
    gate, up, down = (_HF_LAYER + f"{hugging_face}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return (
        Entry((_LAYER + f"{megatron}.linear_fc1.weight",), (gate, up), transforms.GATE_UP, ("FH", "FH")),
        Entry((_LAYER + f"{megatron}.linear_fc2.weight",), (down,), transforms.COLUMNS, ("HF",)),
    )


# Before the router the norm stays a layer of its own, under Transformer Engine's spec too.
EXPERTS_NORM = Entry(
    (_LAYER + "pre_mlp_layernorm.weight",),
    (_HF_LAYER + "post_attention_layernorm.weight",),
    transforms.REPLICATED,
    ("H",),
)
MLP_NORM = replace(
    EXPERTS_NORM, megatron=(*EXPERTS_NORM.megatron, _LAYER + "mlp.linear_fc1.layer_norm_weight")
)
MLP = (MLP_NORM, *_swiglu("mlp", "mlp"))
ROUTER = Entry(
    (_LAYER + "mlp.router.weight",), (_HF_LAYER + "mlp.gate.weight",), transforms.REPLICATED, ("EH",)
)
EXPERT = _swiglu("mlp.experts.local_experts.{e}", "mlp.experts.{e}")


def layer_entries(block: Family) -> tuple[Entry, ...]:
    """The parameters of one layer of a family, those of one expert for all."""
    biases_and_norms = (QKV_BIAS if block.qkv_bias else ()) + (QK_NORM if block.qk_norm else ())
    return ATTENTION + biases_and_norms + ((EXPERTS_NORM, ROUTER, *EXPERT) if block.experts else MLP)


def entries(architecture: Architecture) -> Iterator[Entry]:
    """The parameters of the whole model in order, all numbers filled in; each Hugging Face tensor is in one."""
    yield EMBEDDING
    for i in range(architecture.num_layers):
        for entry in layer_entries(architecture.block):
            experts = architecture.experts.number if architecture.experts and entry in EXPERT else 1
            for e in range(experts):
                yield replace(
                    entry,
                    megatron=tuple(name.format(i=i, e=e) for name in entry.megatron),
                    hugging_face=tuple(name.format(i=i, e=e) for name in entry.hugging_face),
                )
    yield FINAL_NORM
    if not architecture.tied_embeddings:
        yield OUTPUT


def by_megatron_name(architecture: Architecture) -> dict[str, Entry]:
    """Every Megatron name, of either layer spec, to its entry; the tied output layer's copy included."""
    table = {name: entry for entry in entries(architecture) for name in entry.megatron}
    table.setdefault("output_layer.weight", TIED_OUTPUT)
    return table
