"""Architectures that the benchmarks measure."""

from typing import Any

from mpo_megatron.model.architecture import Architecture, architecture_of

LLAMA3_8B = Architecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_positions=8192,
    norm_epsilon=1e-5,
    tied_embeddings=False,
    sliding_window=None,
    inverse_frequencies=tuple(500_000.0 ** (-2 * i / 128) for i in range(64)),
)


def small_config(*, hidden: int, layers: int, vocab: int, max_positions: int) -> Any:
    """Of a Llama of the usual proportions: heads of 64, half as many key-value heads, feed-forward 3 x hidden."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=vocab,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
    )


def small_llama(*, hidden: int, layers: int, vocab: int, max_positions: int) -> Architecture:
    """The architecture of `small_config`."""
    return architecture_of(
        small_config(hidden=hidden, layers=layers, vocab=vocab, max_positions=max_positions)
    )
