"""Every objective at every kind of parallelism against one row on one rank, in float64: loss, metrics, gradients.

KTO's reference point comes from the whole global batch, on all ranks and in all rows: here it is 1.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import Layout, steps_and_gradients
from tests.helpers.models import make_llama
from tests.helpers.objectives import SETTINGS

SIZES, SEED = [2, 9, 3, 5], 95
# The first is evaluated forward only, too.
OBJECTIVES = ["kto", *(name for name in SETTINGS if name != "kto"), "wmpo+sft", "kto+sft"]
RTOL = 1e-10
# (ranks, layout, tokens of a row): of the four groups whole ones lie in rows of 112 tokens, none in rows of 40.
CASES = {
    "one rank": (1, Layout(), 112),
    "one rank, split groups": (1, Layout(), 40),
    "tp2 pp2": (4, Layout(tp=2, pp=2), 112),
    "cp2": (2, Layout(cp=2), 112),
    "dp2, some groups split": (2, Layout(), 64),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=2, initializer_range=0.15)


Found = tuple[list[dict[str, Any]], dict[str, dict[str, torch.Tensor]]]


def run(pool: Any, model: Path, layout: Layout, max_tokens: int, output: Path) -> Found:
    """(values of each rank, gradients by objective)."""
    arguments = (model, SIZES, SEED, layout, {"row": max_tokens}, OBJECTIVES, output)
    results = pool.run(steps_and_gradients, *arguments, timeout=240)
    return results, {name: load_file(output / f"row-{name}" / "model.safetensors") for name in OBJECTIVES}


@pytest.fixture(scope="module")
def baseline(model: Path, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All groups in one row, which runs once for every objective."""
    layout = Layout(precision=torch.float64, global_batch=False)
    return run(ranks(1), model, layout, 4096, tmp_path_factory.mktemp("baseline"))


@pytest.mark.parametrize("case", CASES)
def test_every_objective_is_exact(
    case: str, model: Path, baseline: Found, ranks: Any, tmp_path: Path
) -> None:
    world, wanted, max_tokens = CASES[case]
    layout = Layout(tp=wanted.tp, pp=wanted.pp, cp=wanted.cp, precision=torch.float64)
    results, gradients = run(ranks(world), model, layout, max_tokens, tmp_path)
    (expected,), expected_gradients = baseline
    for result in results:
        evaluated = expected["metrics"]["row-kto"]
        assert result["evaluated"]["row"] == pytest.approx(evaluated, rel=RTOL, abs=RTOL / 10)
        for name in OBJECTIVES:
            key = f"row-{name}"
            found, wanted_metrics = result["metrics"][key], expected["metrics"][key]
            assert found == pytest.approx(wanted_metrics, rel=RTOL, abs=RTOL / 10), name
            assert result["norm"][key] == pytest.approx(expected["norm"][key], rel=RTOL), name
    for name, found_gradients in gradients.items():
        for parameter, gradient in found_gradients.items():
            right = expected_gradients[name][parameter]
            assert (gradient - right).norm() <= RTOL * right.norm(), f"{name}: {parameter}"


@pytest.mark.parametrize("case", ["one rank", "dp2, some groups split"])
def test_a_reference_point_of_each_row_would_be_found(
    case: str, model: Path, baseline: Found, ranks: Any, tmp_path: Path
) -> None:
    """KTO in one pass, as the others run: every row has a reference point of its own, and the comparison fails."""
    world, _, max_tokens = CASES[case]
    layout = Layout(precision=torch.float64, global_batch=False)
    results, _ = run(ranks(world), model, layout, max_tokens, tmp_path)
    wanted = baseline[0][0]["metrics"]
    for result in results:
        assert result["metrics"]["row-kto"]["loss"] != pytest.approx(wanted["row-kto"]["loss"], rel=1e-4)
        assert result["metrics"]["row-dpo"]["loss"] == pytest.approx(wanted["row-dpo"]["loss"], rel=RTOL)


def test_the_objectives_differ(baseline: Found) -> None:
    """What the comparison rests on: gradients that are there, no two alike."""
    (expected,), _ = baseline
    norms = [expected["norm"][f"row-{name}"] for name in OBJECTIVES]
    assert min(norms) > 1e-3
    assert len({round(norm, 9) for norm in norms}) == len(OBJECTIVES)
