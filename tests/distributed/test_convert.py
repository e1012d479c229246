"""Hugging Face folder, distributed checkpoint, Hugging Face folder: the same bits and the same config on every way."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpo_megatron.conversion.convert import export_checkpoint, import_hf
from mpo_megatron.conversion.describe import describe
from mpo_megatron.conversion.hf_folder import INDEX, WeightReader, is_checkpoint, model_folder
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.errors import CheckpointError, ConfigError
from mpo_megatron.model.architecture import FAMILIES
from mpo_megatron.model.norm import RMSNorm
from mpo_megatron.model.provider import unwrap
from tests.distributed.jobs import Layout, build, export, gradients, logps, save
from tests.helpers.models import make_llama, make_model

SIZES = [3, 2]


def assert_same_folder(first: Path, second: Path) -> None:
    """The same tensors to the bit, the same config, and the same other files."""
    before, after = WeightReader(first), WeightReader(second)
    assert before.names() == after.names()
    for name in before.names():
        a, b = (reader.slices([name])[0][:] for reader in (before, after))
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())
    others = {path.name for path in first.iterdir()} - {INDEX}
    for name in (name for name in others if not name.endswith((".safetensors", "config.json"))):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert json.loads((first / "generation_config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", family, tie_word_embeddings=tied, dtype=dtype)
    import_hf(source, tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert_same_folder(source, tmp_path / "exported")
    assert is_checkpoint(tmp_path / "imported")
    assert model_folder(tmp_path / "imported") == tmp_path / "imported" / "hf"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], (
        "a temporary folder was left"
    )


def test_embedding_in_pieces_and_weights_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_llama(tmp_path / "source", tie_word_embeddings=False)
    monkeypatch.setattr("mpo_megatron.conversion.convert.PIECE_BYTES", 1000)
    import_hf(source, tmp_path / "imported")
    reader = CheckpointReader(tmp_path / "imported")
    assert len(reader._tensors["embedding.word_embeddings.weight"].chunks) > 10
    export_checkpoint(tmp_path / "imported", tmp_path / "exported", max_shard_bytes=20_000)
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 3
    assert_same_folder(source, tmp_path / "exported")


def test_an_output_layer_in_a_tied_model(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    import_hf(source, tmp_path / "imported")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight has values of its own; set tie_word_embeddings"
    ):
        import_hf(source, tmp_path / "another")


def test_another_dtype(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    import_hf(source, tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported", dtype=torch.bfloat16)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "exported"))
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"


OPENED = [
    (1, Layout()),
    (2, Layout(tp=2)),
    (2, Layout(pp=2, vpp=2)),
    (4, Layout(tp=2, pp=2)),
    (2, Layout(cp=2, options={"make_vocab_size_divisible_by": 512})),
]


@pytest.mark.parametrize(
    ("family", "world", "layout"),
    [
        *((family, world, layout) for family in ("qwen2", "qwen3") for world, layout in OPENED),
        ("qwen3_moe", 2, Layout(pp=2)),
        ("qwen3_moe", 4, Layout(tp=2, ep=2)),
    ],
)
def test_an_import_opens_at_any_layout(
    family: str, world: int, layout: Layout, ranks: Any, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "source", family, tie_word_embeddings=family == "qwen2")
    import_hf(source, tmp_path / "imported")
    ranks(world).run(export, tmp_path / "imported", layout, tmp_path / "exported")
    assert_same_folder(source, tmp_path / "exported")


def save_and_export(folder: Path, wanted: Layout, saved: Path, exported: Path) -> None:
    """One training step; then a checkpoint, and the export of the live model."""
    from mpo_megatron.conversion.export import export_hf
    from mpo_megatron.training.data_parallel import current_models

    model = build(folder, SIZES, wanted)
    gradients(model, logps(model), "wmpo")
    model.optimizer.step()
    save(model, 1, saved, folder)
    inner = current_models(model.chunks)
    export_hf(inner, model.architecture, model.layout, source=folder, output=exported)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, Layout()),
        (2, Layout(tp=2, precision=torch.bfloat16)),
        (2, Layout(distributed_optimizer=True)),
        (2, Layout(pp=2, vpp=2)),
        (4, Layout(tp=2, pp=2, distributed_optimizer=True)),
        (2, Layout(ep=2, distributed_optimizer=True)),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_training_checkpoint_exports_what_the_live_model_is(
    tied: bool, world: int, layout: Layout, ranks: Any, tmp_path: Path
) -> None:
    family = "qwen2" if layout.ep == 1 else "qwen3_moe"
    source = make_model(tmp_path / "source", family, tie_word_embeddings=tied)
    ranks(world).run(save_and_export, source, layout, tmp_path / "saved", tmp_path / "live")
    saved = tmp_path / "saved" / "step_0000001"
    form = "dp_reshardable" if layout.distributed_optimizer else "of the plain optimizer"
    assert re.search(rf"optimizer .* of float32, {form}\nstep +1$", "\n".join(describe(saved)))
    export_checkpoint(saved, tmp_path / "exported")
    assert_same_folder(tmp_path / "live", tmp_path / "exported")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "exported"))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert all(".experts." in name for name in unchanged), f"the step has not changed {unchanged}"
    assert len(unchanged) < len(before) / 4  # an expert may have had no token


class NormWithScales(RMSNorm):
    """A norm that keeps a state of its own beside its weight, as Transformer Engine's modules keep FP8 scales."""

    scales = torch.zeros(1)

    def get_extra_state(self) -> torch.Tensor:
        return self.scales

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scales = state


def with_norm(folder: Path, has_scales: bool) -> tuple[Any, Any]:
    """(a model, its last norm), which has extra state or not."""
    model = build(folder, SIZES, Layout())
    norm = unwrap(model.chunks[0]).decoder.final_layernorm
    if has_scales:
        norm.__class__ = NormWithScales
    return model, norm


def save_norm(folder: Path, saved: Path, has_scales: bool) -> None:
    """Save a model whose last norm has weights of 3 and, if any, scales of 1."""
    model, norm = with_norm(folder, has_scales)
    norm.scales = torch.ones(1)
    with torch.no_grad():
        norm.weight.fill_(3.0)
    save(model, 1, saved, folder)


def load_norm(folder: Path, saved: Path, has_scales: bool) -> tuple[float, float]:
    """(the weights, the scales) that the last norm has after resuming."""
    from mpo_megatron.training.checkpoint import load_checkpoint

    model, norm = with_norm(folder, has_scales)
    load_checkpoint(saved / "step_0000001", model.chunks, model.optimizer, model.schedule, model.layout)
    return float(norm.weight.mean()), float(getattr(norm, "scales", torch.zeros(1)))


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "scales"), [(True, True, 1.0), (True, False, 0.0), (False, True, 0.0)]
)
def test_extra_state_may_be_absent(
    saved_with: bool, loaded_with: bool, scales: float, ranks: Any, tmp_path: Path
) -> None:
    source = make_llama(tmp_path / "source")
    ranks(1).run(save_norm, source, tmp_path / "saved", saved_with)
    assert ranks(1).run(load_norm, source, tmp_path / "saved", loaded_with) == [(3.0, scales)]


def load_error(folder: Path, wanted: Layout) -> str:
    """The error of opening a checkpoint on this rank."""
    try:
        build(folder, SIZES, wanted)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return ""


def lose_data(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def other_size(folder: Path) -> None:
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


def other_depth(folder: Path) -> None:
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))


def other_family(folder: Path) -> None:
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))


def no_config(folder: Path) -> None:
    shutil.rmtree(folder / "hf")


@pytest.mark.parametrize(
    ("damage", "at_start", "at_export"),
    [
        (lose_data, "__0_0.distcp is missing", "__0_0.distcp is missing"),
        (other_size, "cannot be loaded into this model", "shape (4, 96, 32) where config.json asks for (4, 128, 32)"),
        (other_depth, "cannot be loaded into this model", "has shape (4, 32) where config.json asks for (6, 32)"),
        (other_family, "cannot be loaded into this model", "has no tensor decoder.layers.self_attention"),
        (no_config, "nor a Megatron checkpoint (it has no hf/config.json)", "there is no config.json in"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used(
    damage: Callable[[Path], None], at_start: str, at_export: str, ranks: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "imported"
    import_hf(make_llama(tmp_path / "source"), folder)
    damage(folder)
    first, second = ranks(2).run(load_error, folder, Layout(pp=2))
    assert first == second
    assert at_start in first
    assert "\n" not in first
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        export_checkpoint(folder, tmp_path / "exported")
    assert at_export in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_a_folder_of_checkpoints_names_the_newest(tmp_path: Path) -> None:
    for step in (1, 2):
        import_hf(make_llama(tmp_path / "source"), tmp_path / "run" / "checkpoints" / f"step_000000{step}")
    with pytest.raises(ConfigError, match=r"holds some: give one, such as .*checkpoints/step_0000002"):
        model_folder(tmp_path / "run")
