"""Every layout against one rank with repeated prompts: loss, log-probs, gradients of every parameter, and the update.

Real Megatron schedules, optimizers and collectives on Gloo ranks; ragged groups of 2 to 9 responses in one step.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import Layout, step_and_gradients
from tests.helpers.models import hugging_face_logps, make_groups, make_llama

SIZES = [2, 9, 4, 3, 5, 2, 7, 4]
CASES = {
    "one rank": (1, Layout()),
    "one rank, one row": (1, Layout(max_tokens=2048)),
    "one rank, full recompute": (
        1,
        Layout(
            options={
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        ),
    ),
    "one rank, selective recompute": (1, Layout(options={"recompute_granularity": "selective"})),
    "tp2": (2, Layout(tp=2)),
    "tp2, repeated prompts": (2, Layout(tp=2, shared_prompt=False, max_tokens=512)),
    "tp2, no sequence parallelism": (2, Layout(tp=2, options={"sequence_parallel": False})),
    "tp2, a shard of padding alone": (2, Layout(tp=2, options={"make_vocab_size_divisible_by": 512})),
    "pp2": (2, Layout(pp=2)),
    "pp2, full recompute": (
        2,
        Layout(
            pp=2,
            options={
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ),
    ),
    "pp4": (4, Layout(pp=4)),
    "dp2": (2, Layout()),
    "dp2, distributed optimizer": (2, Layout(distributed_optimizer=True)),
    "tp2 pp2": (4, Layout(tp=2, pp=2)),
    "tp2 dp2, distributed optimizer": (4, Layout(tp=2, distributed_optimizer=True)),
    "pp2 dp2": (4, Layout(pp=2)),
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def baselines(model: Path, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, prompts repeated, one row for each step: results and gradients by objective."""
    found: dict[str, Any] = {}
    for objective in ("mpo", "wmpo"):
        output = tmp_path_factory.mktemp("gradients") / "grad"
        layout = Layout(shared_prompt=False, max_tokens=4096)
        (result,) = ranks(1).run(step_and_gradients, model, SIZES, layout, objective, output)
        found[objective] = {**result, "gradients": load_file(output / "model.safetensors")}
    return found


@pytest.mark.parametrize("objective", ["mpo", "wmpo"])
@pytest.mark.parametrize("name", CASES)
def test_layout_is_exact(
    name: str, objective: str, model: Path, baselines: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    world, layout = CASES[name]
    results = ranks(world).run(step_and_gradients, model, SIZES, layout, objective, tmp_path / "grad")
    expected = baselines[objective]
    for result in results:
        assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(result["logps"], expected["logps"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(result["after"], expected["after"], rtol=1e-4, atol=1e-3)
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert result["padding"] == 0
    if not layout.distributed_optimizer:  # which keeps only a part of the summed gradient on each rank
        gradients = load_file(tmp_path / "grad" / "model.safetensors")
        assert gradients.keys() == expected["gradients"].keys()
        for key, gradient in gradients.items():
            wanted = expected["gradients"][key]
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), key


def test_ranks_without_a_group_take_part(model: Path, ranks: Any, tmp_path: Path) -> None:
    """One group on two data-parallel ranks: the other has a row of padding, and nothing else changes."""
    (expected,) = ranks(1).run(step_and_gradients, model, [5], Layout(), "wmpo", tmp_path / "one")
    for world, layout in ((2, Layout()), (4, Layout(tp=2)), (4, Layout(pp=2))):
        output = tmp_path / f"grad-{world}-{layout.tp}"
        for result in ranks(world).run(step_and_gradients, model, [5], layout, "wmpo", output):
            assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-6)
            assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        wanted = load_file(tmp_path / "one" / "model.safetensors")
        for key, gradient in load_file(output / "model.safetensors").items():
            assert (gradient - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key


def test_one_rank_agrees_with_hugging_face(model: Path, baselines: dict[str, Any]) -> None:
    groups = make_groups(SIZES, _vocab(model))
    torch.testing.assert_close(
        baselines["mpo"]["logps"], hugging_face_logps(model, groups), rtol=0, atol=1e-4
    )


def test_the_step_learns_and_the_gradient_is_not_small(baselines: dict[str, Any]) -> None:
    """What the comparisons above rest on: they compare numbers that are there."""
    for result in baselines.values():
        assert result["norm"] > 0.01
        assert (result["after"] - result["logps"]).abs().max() > 0.1
        assert all(gradient.norm() > 0 for gradient in result["gradients"].values())


def _vocab(folder: Path) -> int:
    from mpo_megatron.model.architecture import read_architecture

    return read_architecture(folder).vocab_size
