"""FP8 on CPU ranks: Transformer Engine's own recipes and quantizers, with casts by torch (tests.helpers).

Scaling by tensor, current and delayed. Casts round to 3 or 2 bits, so log-probs and gradients are near those of bf16
and no nearer; what is exact is that a row gives the same numbers whenever it runs, where the recipe has no past.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.model.fp8 import Fp8
from tests.distributed.jobs import Layout, build, evaluate, gradients, logps
from tests.helpers.models import make_llama

SIZES = [2, 9, 4, 3]
PLAIN: dict[str, Any] = {"transformer_engine": True}


def options(recipe: str, **more: Any) -> dict[str, Any]:
    return PLAIN | {"fp8": Fp8("hybrid", recipe, **more)}


def step_zero(folder: Path, wanted: Layout) -> dict[str, Any]:
    """Reference, validation and first step of W-MPO: log-probs, metrics, and the gradient as this rank has it."""
    model = build(folder, SIZES, wanted)
    reference = logps(model)
    evaluated = evaluate(model, reference, "wmpo")
    for chunk in model.chunks:
        chunk.train()
    trained = gradients(model, reference, "wmpo")
    own = [parameter.main_grad.flatten() for chunk in model.chunks for parameter in chunk.parameters()]
    return {
        "logps": reference,
        "evaluated": evaluated,
        "trained": trained,
        "gradient": torch.cat(own).clone(),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), intermediate_size=64, initializer_range=0.15)


@pytest.fixture(scope="module")
def bf16(model: Path, te_ranks: Any) -> dict[str, Any]:
    return te_ranks(1).run(step_zero, model, Layout(options=PLAIN, precision=torch.bfloat16))[0]


def layout(recipe: str, **sizes: Any) -> Layout:
    more = sizes.pop("more", {})
    return Layout(options=options(recipe, **more), precision=torch.bfloat16, **sizes)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize(
    ("world", "sizes"), [(1, {}), (2, {"pp": 2}), (2, {"tp": 2})], ids=["1", "pp2", "tp2"]
)
def test_it_is_near_bf16_and_not_bf16(
    world: int, sizes: dict[str, int], recipe: str, model: Path, bf16: dict[str, Any], te_ranks: Any
) -> None:
    found = te_ranks(world).run(step_zero, model, layout(recipe, **sizes))[0]
    error = (found["logps"] - bf16["logps"]).abs() / bf16["logps"].abs()
    print(f"{recipe} {sizes}: log-probs off by {error.mean():.2%}, at most {error.max():.2%}; "
          f"margins {found['evaluated']['reward_margin']:+.2e}, {found['trained']['reward_margin']:+.2e}")  # fmt: skip
    assert 0 < float(error.max()) < 0.05
    if world == 1:
        cosine = torch.cosine_similarity(found["gradient"], bf16["gradient"], dim=0)
        print(f"gradient: cosine {cosine:.4f}")
        # The first backward pass has no earlier gradients to take delayed scales from.
        assert float(cosine) > (0.9 if recipe == "tensorwise" else 0.7)
    margins = [found[phase]["reward_margin"] for phase in ("evaluated", "trained")]
    if recipe == "tensorwise":
        assert margins == [0.0, 0.0]
    else:
        assert margins[1] != 0.0  # as the start of such a run says


def test_stages_have_the_scales_of_one_rank(model: Path, te_ranks: Any) -> None:
    """To the last bit: a stage has whole tensors."""
    one, two = (te_ranks(world).run(step_zero, model, layout("tensorwise", pp=world))[0] for world in (1, 2))
    assert torch.equal(one["logps"], two["logps"])
    assert one["trained"]["loss"] == pytest.approx(two["trained"]["loss"], rel=1e-6)


def test_layers_may_stay_in_bf16(model: Path, bf16: dict[str, Any], te_ranks: Any) -> None:
    """The more of them, the nearer."""
    errors = []
    for kept in (0, 2, 3):
        wanted = layout("tensorwise", more={"first_bf16": (kept + 1) // 2, "last_bf16": kept // 2})
        found = te_ranks(1).run(step_zero, model, wanted)[0]
        errors.append(float((found["logps"] - bf16["logps"]).abs().mean()))
    assert errors[0] > errors[2] > 0, errors
