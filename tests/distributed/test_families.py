"""Every family is the model that transformers builds from the same folder, at every kind of layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.model.architecture import FAMILIES, read_architecture
from tests.distributed.jobs import Layout, logps_and_export
from tests.distributed.test_checkpoint import train
from tests.distributed.test_layouts import ALL, BUDGETS, FULL, RTOL, SEED, SIZES, assert_same, run
from tests.helpers.models import hugging_face_logps, make_groups, make_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
HEADS_1 = {"num_attention_heads": 4, "num_key_value_heads": 4}
HEADS_4 = {"num_attention_heads": 8, "num_key_value_heads": 2}
HEADS_8 = {"num_attention_heads": 16, "num_key_value_heads": 2}
# Query heads of a key-value head: 1, 4 and 8; head_dim unlike hidden_size / heads where the family has it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**HEADS_4, "head_dim": 10, "rope_parameters": LLAMA3_ROPE}),
    "llama yarn": (
        "llama",
        {**HEADS_1, "head_dim": 16, "rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.8}},
    ),
    "mistral": ("mistral", {**HEADS_8, "head_dim": 6, "sliding_window": 64, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**HEADS_4, "tie_word_embeddings": False}),
    "qwen2 yarn": ("qwen2", {**HEADS_8, "hidden_size": 128, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {**HEADS_1, "head_dim": 12}),
    "qwen3_moe": ("qwen3_moe", {**HEADS_4, "head_dim": 10}),
    "qwen3_moe, weights over all experts": (
        "qwen3_moe",
        {**HEADS_4, "head_dim": 10, "norm_topk_prob": False, "tie_word_embeddings": False},
    ),
    "qwen3 yarn": (
        "qwen3",
        {
            **HEADS_8,
            "head_dim": 14,
            "tie_word_embeddings": False,
            "rope_parameters": YARN | {"attention_factor": 0.9, "truncate": False},
        },
    ),
}
LAYOUTS = {
    "one rank": (1, Layout()),
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "tp2 pp2": (4, Layout(tp=2, pp=2)),
}
EXPERT_LAYOUTS = {
    "ep2": (2, Layout(ep=2)),
    "ep2 tp2": (4, Layout(ep=2, tp=2)),
}
GRADIENT_LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "tp2, no sequence parallelism": (2, Layout(tp=2, options={"sequence_parallel": False})),
    "pp2": (2, Layout(pp=2)),
    "cp2": (2, Layout(cp=2)),
}
# Sequence parallelism always: without it Megatron trains no experts over tensor-parallel ranks.
EXPERT_GRADIENT_LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "ep2": (2, Layout(ep=2)),
    "ep2 over cp2": (2, Layout(ep=2, cp=2)),
    "ep2 dp4": (4, Layout(ep=2)),
    "ep2 tp2, full recompute": (4, Layout(ep=2, tp=2, options=FULL)),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a name of MODELS to the folder of that model, of float64 weights."""
    made: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in made:
            family, changes = MODELS[name]
            folder = tmp_path_factory.mktemp("model")
            made[name] = make_model(
                folder, family, dtype=torch.float64, **{"initializer_range": 0.15, **changes}
            )
        return made[name]

    return model


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, layout) for name in MODELS for layout in LAYOUTS if "all experts" not in name),
        *(("qwen3_moe", layout) for layout in EXPERT_LAYOUTS),
        ("qwen3_moe, weights over all experts", "ep2"),
    ],
)
def test_same_log_probs_and_same_bits(name: str, layout: str, make: Any, ranks: Any, tmp_path: Path) -> None:
    source = make(name)
    world, wanted = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    wanted = replace(wanted, precision=torch.float64)
    ours = ranks(world).run(logps_and_export, source, SIZES, SEED, wanted, tmp_path / "out")
    groups = make_groups(SIZES, read_architecture(source).vocab_size, seed=SEED)
    # With norms, and with yarn's factor, in float64: see compute_in_float64.
    theirs = hugging_face_logps(source, groups, torch.float64)
    print(f"{name}, {layout}: largest difference {max((o - theirs).abs().max() for o in ours):.1e}")
    for logps in ours:
        torch.testing.assert_close(logps, theirs, rtol=RTOL, atol=RTOL)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, make: Any, ranks: Any, tmp_path_factory: Any) -> Any:
    """A model, and what one rank with repeated prompts makes of it."""
    source = make(request.param)
    layout = Layout(shared_prompt=False, precision=torch.float64)
    ((result,), gradients) = run(
        ranks(1), source, layout, tmp_path_factory.mktemp("one"), {"whole": 4096}, steps=ALL
    )
    return source, {**result, "gradients": gradients}


@pytest.mark.parametrize(
    ("trained", "layout"),
    [
        *((name, layout) for name in ("qwen2", "qwen3 yarn") for layout in GRADIENT_LAYOUTS),
        *(("qwen3_moe", layout) for layout in EXPERT_GRADIENT_LAYOUTS),
    ],
    indirect=["trained"],
)
def test_gradients_of_every_parameter(layout: str, trained: Any, ranks: Any, tmp_path: Path) -> None:
    source, baseline = trained
    world, wanted = (GRADIENT_LAYOUTS | EXPERT_GRADIENT_LAYOUTS)[layout]
    wanted = replace(wanted, precision=torch.float64)
    found = run(ranks(world), source, wanted, tmp_path, {"mixed": BUDGETS["mixed"]})
    assert_same(*found, baseline)
    assert any(".q_norm." in name or ".q_proj.bias" in name for name in found[1]["mixed-mpo"])
    assert all(gradient.norm() > 0 for gradient in found[1]["mixed-mpo"].values())


@pytest.mark.parametrize(
    ("trained", "layout", "fault"),
    [
        (
            "qwen3 yarn",
            GRADIENT_LAYOUTS["tp2, no sequence parallelism"][1],
            "qk_norm_gradients_left_on_their_rank",
        ),
        ("qwen3_moe", EXPERT_LAYOUTS["ep2"][1], "experts_gradients_summed_with_those_of_others"),
    ],
    indirect=["trained"],
)
def test_a_fault_is_found(trained: Any, layout: Layout, fault: str, ranks: Any, tmp_path: Path) -> None:
    source, baseline = trained
    layout = replace(layout, precision=torch.float64)
    found = run(ranks(2), source, layout, tmp_path, {"mixed": BUDGETS["mixed"]}, fault=fault)
    with pytest.raises(AssertionError):
        assert_same(*found, baseline, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "saved", "resumed"),
    [
        ("qwen2", Layout(tp=2), Layout(pp=2)),
        ("qwen3", Layout(tp=2), Layout(pp=2)),
        ("qwen3_moe", Layout(ep=2), Layout(tp=2)),
    ],
)
def test_resume_at_another_layout(
    name: str, saved: Layout, resumed: Layout, make: Any, ranks: Any, tmp_path: Path
) -> None:
    """Megatron's checkpoints hold the biases and norms of every rank's heads, and its experts, with their moments."""
    one, before, after = (replace(each, precision=torch.float64) for each in (Layout(), saved, resumed))
    ((unbroken, _),) = ranks(1).run(train, make(name), one, 4, None, None)
    ranks(2).run(train, make(name), before, 2, None, tmp_path)
    for found, _ in ranks(2).run(train, make(name), after, 2, tmp_path, None):
        torch.testing.assert_close(found, unbroken, rtol=1e-7, atol=1e-7)


def test_experts_resume_with_the_distributed_optimizer(ranks: Any, tmp_path: Path) -> None:
    """In float32: it takes no float64 parameters. Experts and all else have their own part of it."""
    family, changes = MODELS["qwen3_moe"]
    source = make_model(tmp_path / "model", family, **changes)
    one, ep2_tp2, ep2 = (
        replace(layout, distributed_optimizer=True)
        for layout in (Layout(), EXPERT_LAYOUTS["ep2 tp2"][1], EXPERT_LAYOUTS["ep2"][1])
    )
    ((unbroken, _),) = ranks(1).run(train, source, one, 4, None, None)
    ranks(4).run(train, source, ep2_tp2, 2, None, tmp_path / "checkpoints")
    for world, layout in ((1, one), (2, ep2)):
        for found, _ in ranks(world).run(train, source, layout, 2, tmp_path / "checkpoints", None):
            torch.testing.assert_close(found, unbroken, rtol=1e-4, atol=1e-3)


def test_every_family_is_here() -> None:
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)
