"""Every layout against one rank with repeated prompts: loss, log-probs, gradients of every parameter, and the update.

Real Megatron schedules, optimizers and collectives on Gloo ranks; ragged groups of 2 to 9 responses in one step: rows
hold several whole groups (`whole`), or are too short for all of them, so that these run in two passes (`split`), or for
half of them (`mixed`). In float64, since float32 parity is a test of the processor; what Megatron refuses to do in
float64, or does otherwise in float32 and bf16, has cases of its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.model.architecture import read_architecture
from tests.distributed import faults
from tests.distributed.jobs import Layout, steps_and_gradients
from tests.helpers.models import hugging_face_logps, make_groups, make_llama
from tests.helpers.ranks import RankError

SIZES = [2, 9, 3, 5]
# Of all groups with these sizes, such that a row may hold the longest prompt with a response, but no whole group.
SEED = 95
BUDGETS = {"whole": 112, "mixed": 64, "split": 40}
# Not every one with every budget: tests/distributed/test_objectives.py has all of them, in few layouts.
STEPS = {"whole": ["wmpo"], "mixed": ["mpo"], "split": ["wmpo", "dpo_cross_pairs"]}
REPEATED_BUDGETS = {"whole": 208, "mixed": 80, "split": 40}
ALL = {"whole": ["mpo", "wmpo", "dpo_cross_pairs"]}
SPLIT = {"whole": 0, "mixed": 2, "split": 4}  # of the groups
RTOL = 1e-10
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
SELECTIVE = {"recompute_granularity": "selective"}
UNFUSED = {"fuse_weight_gradients": False}
CASES = {
    "one rank": (1, Layout()),
    "one rank, gradients not fused": (1, Layout(options=UNFUSED)),
    "one rank, full recompute": (1, Layout(options=FULL)),
    "one rank, selective recompute": (1, Layout(options=SELECTIVE)),
    "tp2": (2, Layout(tp=2)),
    "tp2, gradients not fused": (2, Layout(tp=2, options=UNFUSED)),
    "tp2, repeated prompts": (2, Layout(tp=2, shared_prompt=False)),
    "tp2, no sequence parallelism": (2, Layout(tp=2, options={"sequence_parallel": False})),
    "tp2, a shard of padding alone": (2, Layout(tp=2, options={"make_vocab_size_divisible_by": 512})),
    "pp2": (2, Layout(pp=2)),
    "pp2, full recompute": (2, Layout(pp=2, options=FULL)),
    "pp2 vpp2": (2, Layout(pp=2, vpp=2)),
    "pp2 vpp2, full recompute": (2, Layout(pp=2, vpp=2, options=FULL)),
    "pp4": (4, Layout(pp=4)),
    "pp2, one layer in the first stage": (2, Layout(pp=2, options={FIRST: 1})),
    "pp2, one layer in the last stage": (2, Layout(pp=2, options={LAST: 1})),
    "pp2, 3 layers and 1": (2, Layout(pp=2, options={FIRST: 3, LAST: 1})),
    "pp3, 1, 2 and 1 layers": (3, Layout(pp=3, options={FIRST: 1, LAST: 1})),
    "pp3, 1, 2 and 1 layers, full recompute": (3, Layout(pp=3, options={FIRST: 1, LAST: 1, **FULL})),
    "cp2": (2, Layout(cp=2)),
    "cp2, selective recompute": (2, Layout(cp=2, options=SELECTIVE)),
    "cp2 tp2": (4, Layout(cp=2, tp=2)),
    "cp2 pp2": (4, Layout(cp=2, pp=2)),
    "cp2 pp2 vpp2": (4, Layout(cp=2, pp=2, vpp=2)),
    "cp2 dp2": (4, Layout(cp=2)),
    "cp4": (4, Layout(cp=4)),
    "dp2": (2, Layout()),
    "dp2, padded to 48": (2, Layout(multiple=48)),
    "tp2, padded to 3 x tp": (2, Layout(tp=2, multiple=3)),
    "dp2, overlap": (2, Layout(overlap=True)),
    "tp2 pp2": (4, Layout(tp=2, pp=2)),
    "tp2 pp2 vpp2": (4, Layout(tp=2, pp=2, vpp=2)),
    "dp2 pp2": (4, Layout(pp=2)),
    "dp2 pp2, overlap": (4, Layout(pp=2, overlap=True)),
    "dp2 pp2 vpp2": (4, Layout(pp=2, vpp=2)),
    "dp2 pp2 vpp2, overlap": (4, Layout(pp=2, vpp=2, overlap=True)),
    "cp2 tp2, overlap": (4, Layout(cp=2, tp=2, overlap=True)),
}
EMBEDDINGS_APART = ("recompute", "padded", "layer", "repeated", "no sequence", "cp4")


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied, or with untied embeddings."""
    folder = tmp_path_factory.mktemp("model")
    return make_llama(folder, tie_word_embeddings=request.param == "tied", initializer_range=0.15)


@pytest.fixture(scope="module")
def baseline(model: Path, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, prompts repeated, all groups in one row."""
    layout = Layout(shared_prompt=False, precision=torch.float64)
    output = tmp_path_factory.mktemp("baseline")
    ((result,), gradients) = run(ranks(1), model, layout, output, {"whole": 4096}, steps=ALL)
    return {**result, "gradients": gradients}


@pytest.fixture(scope="module")
def deeper(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model of 6 layers, which two chunks on each of two stages can hold as 2 and 4; and its baseline."""
    folder = make_llama(tmp_path_factory.mktemp("deeper"), num_hidden_layers=6, initializer_range=0.15)
    layout = Layout(shared_prompt=False, precision=torch.float64)
    output = tmp_path_factory.mktemp("baseline of deeper")
    ((result,), gradients) = run(ranks(1), folder, layout, output, {"whole": 4096}, steps=ALL)
    return folder, {**result, "gradients": gradients}


def run(
    pool: Any,
    model: Path,
    layout: Layout,
    output: Path,
    budgets: dict[str, int] = BUDGETS,
    sizes: list[int] = SIZES,
    fault: str | None = None,
    steps: dict[str, list[str]] = STEPS,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, torch.Tensor]]]:
    """`steps_and_gradients` on the pool's ranks: (each rank's values, gradients by budget and objective)."""
    arguments = (model, sizes, SEED, layout, budgets, steps, output)
    if fault is None:
        results = pool.run(steps_and_gradients, *arguments)
    else:
        results = pool.run(faults.run_with, fault, steps_and_gradients, *arguments)
    return results, {folder.name: load_file(folder / "model.safetensors") for folder in output.iterdir()}


def assert_metrics(found: dict[str, float], wanted: dict[str, float], rtol: float) -> None:
    assert found == pytest.approx(wanted, rel=rtol, abs=rtol / 10)


def assert_same(
    results: list[dict[str, Any]],
    gradients: dict[str, dict[str, torch.Tensor]],
    baseline: dict[str, Any],
    rtol: float = RTOL,
) -> None:
    """The comparison: every rank's values, and the gradients that the ranks together have written."""
    for result in results:
        for budget, found in result["logps"].items():
            torch.testing.assert_close(
                found.double(), baseline["logps"]["whole"].double(), rtol=rtol, atol=rtol
            )
            for name in STEPS[budget]:
                key, wanted = f"{budget}-{name}", f"whole-{name}"
                assert_metrics(result["metrics"][key], baseline["metrics"][wanted], rtol)
                assert result["norm"][key] == pytest.approx(baseline["norm"][wanted], rel=rtol)
            assert_metrics(
                result["evaluated"][budget], baseline["metrics"][f"whole-{STEPS[budget][0]}"], rtol
            )
        assert result["padding"] == 0
    for key, found in gradients.items():
        wanted = baseline["gradients"]["whole-" + key.split("-")[1]]
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            difference = (gradient.double() - wanted[name].double()).norm()
            assert difference <= rtol * wanted[name].double().norm(), f"{key}: {name}"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("tied", name) for name in CASES),
        # What the embeddings have no part in is run once.
        *(("untied", name) for name in CASES if not any(word in name for word in EMBEDDINGS_APART)),
    ],
    indirect=["model"],
)
def test_layout_is_exact(
    name: str, model: Path, baseline: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    world, layout = CASES[name]
    budgets = BUDGETS if layout.shared_prompt else REPEATED_BUDGETS
    layout = replace(layout, precision=torch.float64)
    results, gradients = run(ranks(world), model, layout, tmp_path, budgets)
    assert results[0]["split"] == SPLIT
    assert_same(results, gradients, baseline)
    for result in results:
        torch.testing.assert_close(result["after"], baseline["after"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("ends", [{FIRST: 2}, {LAST: 2}, {FIRST: 4, LAST: 2}])
def test_interleaved_stages_of_unequal_size_are_exact(
    ends: dict[str, int], deeper: tuple[Path, dict[str, Any]], ranks: Any, tmp_path: Path
) -> None:
    folder, expected = deeper
    layout = Layout(pp=2, vpp=2, precision=torch.float64, options=ends)
    assert_same(*run(ranks(2), folder, layout, tmp_path), expected)


@pytest.mark.parametrize(
    "layout",
    [
        (2, Layout()),
        (2, Layout(overlap=True)),
        (4, Layout(tp=2)),
        (4, Layout(tp=2, overlap=True)),
        (4, Layout(pp=2)),
        (4, Layout(pp=2, overlap=True)),
        (4, Layout(cp=2)),
    ],
)
def test_ranks_without_a_group_take_part(
    layout: tuple[int, Layout], model: Path, ranks: Any, tmp_path: Path
) -> None:
    """One group on two data-parallel ranks, and more ranks than parts: the others have rows of padding."""
    world, wanted = layout
    alone = Layout(precision=torch.float64)
    ((expected,), gradients) = run(ranks(1), model, alone, tmp_path / "1", {"whole": 256}, [5], steps=ALL)
    wanted = replace(wanted, precision=torch.float64)
    found = run(ranks(world), model, wanted, tmp_path / "2", {"whole": 256, "split": 40}, [5])
    assert found[0][0]["split"] == {"whole": 0, "split": 1}
    assert_same(*found, {**expected, "gradients": gradients})


@pytest.mark.parametrize("model", ["tied"], indirect=True)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["cp2 dp2", "dp2 pp2 vpp2", "tp2 dp2"])
def test_distributed_optimizer_agrees_with_the_plain_one(
    name: str, overlap: bool, model: Path, ranks: Any, tmp_path: Path
) -> None:
    """In float32: Megatron's distributed optimizer takes no float64 parameters."""
    world, layout = CASES[name] if name in CASES else (4, Layout(tp=2))
    ((expected, *_), gradients) = run(ranks(world), model, layout, tmp_path / "plain")
    sharded = replace(layout, distributed_optimizer=True, overlap=overlap)
    results, sharded_gradients = run(ranks(world), model, sharded, tmp_path / "sharded")
    for result in results:
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-4)
        torch.testing.assert_close(result["after"], expected["after"], rtol=1e-3, atol=1e-2)
    for key, found in sharded_gradients.items():
        for parameter, gradient in found.items():
            wanted = gradients[key][parameter]
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), f"{key}: {parameter}"


@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_float32_is_near(model: Path, baseline: dict[str, Any], ranks: Any, tmp_path: Path) -> None:
    """Within the error of float32, whatever the processor."""
    world, layout = CASES["tp2 pp2 vpp2"]
    assert_same(*run(ranks(world), model, layout, tmp_path), baseline, rtol=1e-3)


@pytest.mark.parametrize("model", ["tied"], indirect=True)
@pytest.mark.parametrize("name", ["dp2", "cp2 pp2"])
def test_bfloat16_is_near(
    name: str, model: Path, baseline: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    """bf16 weights with float32 gradients and the distributed optimizer: within the error of bf16."""
    world, layout = CASES[name]
    layout = replace(layout, precision=torch.bfloat16, distributed_optimizer=True)
    results, _ = run(ranks(world), model, layout, tmp_path)
    for result in results:
        for budget in BUDGETS:
            wanted = baseline["logps"]["whole"]
            torch.testing.assert_close(result["logps"][budget].double(), wanted, rtol=0.01, atol=0.5)
            for objective in STEPS[budget]:
                assert result["norm"][f"{budget}-{objective}"] == pytest.approx(
                    baseline["norm"][f"whole-{objective}"], rel=0.1
                )


@pytest.mark.parametrize("model", ["tied"], indirect=True)
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_is_found(
    fault: str, model: Path, baseline: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    """The comparison, or before it the guard, fails for a wrong plan, layout or count: none is an error by itself."""
    world, layout, kind = faults.FAULTS[fault]
    layout = replace(layout, precision=torch.float64)
    arguments = (ranks(world), model, layout, tmp_path, {kind: BUDGETS[kind]})
    if fault in faults.NOT_FINITE:
        with pytest.raises(RankError, match=r"guard\.NotFinite"):
            run(*arguments, fault=fault)
        return
    found = run(*arguments, fault=fault)
    with pytest.raises(AssertionError):
        assert_same(*found, baseline, rtol=1e-3)  # far above any rounding


def test_one_rank_agrees_with_hugging_face(model: Path, baseline: dict[str, Any]) -> None:
    groups = make_groups(SIZES, read_architecture(model).vocab_size, seed=SEED)
    wanted = hugging_face_logps(model, groups, torch.float64)
    torch.testing.assert_close(baseline["logps"]["whole"], wanted, rtol=RTOL, atol=RTOL)


def test_the_step_learns_and_the_gradient_is_not_small(baseline: dict[str, Any]) -> None:
    """What the comparisons above rest on: they compare numbers that are there, and differ between objectives."""
    norms = list(baseline["norm"].values())
    assert min(norms) > 0.01
    assert len({round(norm, 4) for norm in norms}) == len(norms)
    assert (baseline["after"] - baseline["logps"]["whole"]).abs().max() > 0.1
    for gradients in baseline["gradients"].values():
        assert all(gradient.norm() > 0 for gradient in gradients.values())
