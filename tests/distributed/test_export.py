"""Import and export at every layout give back the bits that went in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_megatron.conversion.hf_folder import INDEX, WeightReader
from mpo_megatron.errors import CheckpointError
from tests.distributed.jobs import Layout, export, train_and_export
from tests.helpers.models import hugging_face_logps, make_groups, make_llama

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, Layout()),
        (2, Layout(tp=2)),
        (2, Layout(pp=2)),
        (4, Layout(tp=2, pp=2)),
        (2, Layout(pp=2, vpp=2)),
        (2, Layout(pp=2, options={FIRST: 1})),
        (3, Layout(pp=3, options={FIRST: 1, LAST: 1})),
        (2, Layout(cp=2)),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_identical(
    world: int, layout: Layout, tied: bool, ranks: Any, tmp_path: Path
) -> None:
    source = make_llama(tmp_path / "source", tie_word_embeddings=tied, rope_parameters=LLAMA3_ROPE)
    ranks(world).run(export, source, layout, tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (source / "config.json").read_text().split() == (
        tmp_path / "out" / "config.json"
    ).read_text().split()
    assert not list(tmp_path.glob(".out-*")), "a temporary folder was left"
    ids = torch.arange(20)[None]
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, tmp_path / "out")
    )
    assert torch.equal(theirs, ours)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template


def test_shards_and_replacement_of_an_older_folder(ranks: Any, tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").touch()
    ranks(2).run(export, source, Layout(pp=2), tmp_path / "out", 20_000)
    assert not (tmp_path / "out" / "stale").exists()
    assert (tmp_path / "out" / INDEX).is_file()
    before = load_file(source / "model.safetensors")
    reader = WeightReader(tmp_path / "out")
    for name, read in zip(reader.names(), reader.slices(reader.names()), strict=True):
        assert torch.equal(read[:], before[name])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_sharded_bfloat16_source(ranks: Any, tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source", dtype=torch.bfloat16)
    ranks(2).run(export, source, Layout(tp=2, precision=torch.bfloat16), tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        after[name].dtype == torch.bfloat16 and torch.equal(before[name], after[name]) for name in before
    )


@pytest.mark.parametrize(("world", "layout"), [(1, Layout()), (4, Layout(tp=2, pp=2))])
def test_the_exported_model_is_the_trained_model(
    world: int, layout: Layout, ranks: Any, tmp_path: Path
) -> None:
    source, sizes = make_llama(tmp_path / "source"), [3, 2, 4]
    trained = ranks(world).run(train_and_export, source, sizes, layout, tmp_path / "out")[0]
    vocab_size = AutoModelForCausalLM.from_pretrained(source).config.vocab_size
    groups = make_groups(sizes, vocab_size)
    torch.testing.assert_close(trained, hugging_face_logps(tmp_path / "out", groups), rtol=0, atol=1e-4)
    assert (trained - hugging_face_logps(source, groups)).abs().max() > 0.1


def failing_export(folder: Path, wanted: Layout, output: Path) -> str:
    """The error of an export on this rank."""
    try:
        export(folder, wanted, output)
    except CheckpointError as error:
        return str(error)
    return ""


def test_an_export_that_cannot_be_written_is_an_error_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    (tmp_path / "file").touch()
    first, second = ranks(2).run(failing_export, source, Layout(pp=2), tmp_path / "file" / "out")
    assert first == second
    assert "file/out cannot be written (File exists); nothing was left there" in first
