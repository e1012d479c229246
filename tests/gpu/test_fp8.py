"""FP8 on a GPU that has it, against bf16 in the same layers; on CPU ranks: tests/distributed/test_fp8.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.model.fp8 import RECIPES
from tests.distributed.jobs import Layout
from tests.distributed.test_fp8 import PLAIN, make_fp8_model, options, step_zero
from tests.gpu.conftest import Place

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fp8_model(tmp_path_factory.mktemp("model"))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_near_bf16_and_margins_are_zero(
    name: str, recipe: str, gpu: Place, model: Path, measured: Any
) -> None:
    world, sizes = LAYOUTS[name]
    pool = gpu.ranks(world)
    gpu.needs_recipe(recipe)
    eight = Layout(options=options(recipe), precision=torch.bfloat16, accelerator="gpu", **sizes)  # type: ignore[arg-type]
    found = pool.run(step_zero, model, eight, timeout=280)[0]
    wanted = pool.run(step_zero, model, replace(eight, options=PLAIN), timeout=280)[0]
    error = (found["logps"] / wanted["logps"] - 1).abs().max()
    assert float(error) > 0, "the products were not in 8 bits"
    measured("log-probs, relative", float(error), at_most=0.05)
    cosine = torch.cosine_similarity(found["gradient"], wanted["gradient"], dim=0)
    # The first backward pass has no earlier gradients to take delayed scales from.
    measured("1 - cosine of gradients", 1 - float(cosine), at_most=0.3 if recipe == "delayed" else 0.1)
    if recipe != "delayed":
        for phase in ("evaluated", "trained"):
            measured(f"margin, {phase}", abs(found[phase]["reward_margin"]), at_most=0.0)
