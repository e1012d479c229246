"""Cut and join are each other's inverse at every number of ranks, and the cut is Megatron's order of rows."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mpo_megatron.conversion import transforms
from mpo_megatron.conversion.names import by_megatron_name, entries
from mpo_megatron.conversion.transforms import Cut
from mpo_megatron.model.architecture import FAMILIES, architecture_of
from tests.helpers.models import saved_parameters

ARCHITECTURE = architecture_of(
    LlamaConfig(
        vocab_size=37,
        hidden_size=48,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=6,
        head_dim=4,
    )
)
Q, KV, F, H, V = 48, 24, 36, 48, 37
SOURCES: list[tuple[str, list[tuple[int, ...]]]] = [
    ("REPLICATED", [(H,)]),
    ("COLUMNS", [(H, F)]),
    ("VOCABULARY", [(V, H)]),
    ("GATE_UP", [(F, H), (F, H)]),
    ("QKV", [(Q, H), (KV, H), (KV, H)]),
    ("QKV", [(Q,), (KV,), (KV,)]),  # biases
]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("kind", "shapes"), SOURCES)
def test_join_undoes_cut(kind: str, shapes: list[tuple[int, ...]], size: int) -> None:
    sources = [torch.randn(shape) for shape in shapes]
    chosen = getattr(transforms, kind)
    padded = ARCHITECTURE.padded_vocab_size(8, size)
    shards = [chosen.cut(sources, Cut(ARCHITECTURE, padded, rank, size)) for rank in range(size)]
    joined = chosen.join(shards, Cut(ARCHITECTURE, padded, 0, size))
    assert all(torch.equal(a, b) for a, b in zip(joined, sources, strict=True))
    assert len({shard.shape for shard in shards}) == 1


def test_qkv_rows_go_group_by_group() -> None:
    # Rows labelled by (matrix, head): Megatron wants [q q k v] for each key-value head.
    q = torch.arange(12).repeat_interleave(4)[:, None].float()
    k, v = (torch.arange(6).repeat_interleave(4)[:, None].float() + start for start in (100, 200))
    shard = transforms.QKV.cut([q, k, v], Cut(ARCHITECTURE, 0, 1, 3))
    assert shard[::4, 0].tolist() == [4, 5, 102, 202, 6, 7, 103, 203]
    bias = transforms.QKV.cut([q[:, 0], k[:, 0], v[:, 0]], Cut(ARCHITECTURE, 0, 1, 3))
    assert torch.equal(bias, shard[:, 0])


def test_vocabulary_is_padded_with_zeros() -> None:
    source = torch.randn(V, H)
    shards = [transforms.VOCABULARY.cut([source], Cut(ARCHITECTURE, 96, rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat(shards)[:V], source)
    assert torch.equal(torch.cat(shards)[V:], torch.zeros(96 - V, H))
    assert torch.equal(shards[2], torch.zeros(32, H))  # a rank whose rows are all padding


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hugging_face_tensor_is_named_once_with_its_shape(family: str) -> None:
    for tied in (True, False):
        config = AutoConfig.for_model(
            family, vocab_size=37, hidden_size=48, intermediate_size=36, num_hidden_layers=2, num_attention_heads=12,
            num_key_value_heads=6, head_dim=4, tie_word_embeddings=tied, num_experts=3, moe_intermediate_size=12,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        theirs = {name: parameter.shape for name, parameter in saved_parameters(model).items()}
        architecture = architecture_of(config)
        ours = [item for entry in entries(architecture) for item in entry.shapes(architecture).items()]
        assert sorted(ours) == sorted(theirs.items())
        assert "output_layer.weight" in by_megatron_name(architecture)
