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
from tests.helpers.transformer_engine import block_scaling

SIZES = [2, 9, 4, 3]
PLAIN: dict[str, Any] = {"transformer_engine": True}
RECIPES = ["tensorwise", "delayed", "blockwise"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "pp2": (2, {"pp": 2}),
    "tp2": (2, {"tp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "cp2": (2, {"cp": 2}),
}


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
        "split": len(model.source.plan(range(len(SIZES))).split),
    }


def make_fp8_model(folder: Path) -> Path:
    """Matrices of 128 x 128 and more on each of two tensor-parallel ranks, as blocks need."""
    return make_llama(folder, hidden_size=256, intermediate_size=256, initializer_range=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fp8_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bf16(model: Path, te_ranks: Any) -> dict[str, Any]:
    return te_ranks(1).run(step_zero, model, Layout(options=PLAIN, precision=torch.bfloat16))[0]


def layout(recipe: str, **sizes: Any) -> Layout:
    more = sizes.pop("more", {})
    return Layout(options=options(recipe, **more), precision=torch.bfloat16, **sizes)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_near_bf16_and_not_bf16(
    name: str, recipe: str, model: Path, bf16: dict[str, Any], te_ranks: Any
) -> None:
    world, sizes = LAYOUTS[name]
    found = te_ranks(world).run(step_zero, model, layout(recipe, **sizes))[0]
    error = (found["logps"] - bf16["logps"]).abs() / bf16["logps"].abs()
    print(f"{recipe} {name}: log-probs off by {error.mean():.2%}, at most {error.max():.2%}; "
          f"margins {found['evaluated']['reward_margin']:+.2e}, {found['trained']['reward_margin']:+.2e}")  # fmt: skip
    assert 0 < float(error.max()) < 0.05
    if world == 1:
        cosine = torch.cosine_similarity(found["gradient"], bf16["gradient"], dim=0)
        print(f"gradient: cosine {cosine:.4f}")
        # The first backward pass has no earlier gradients to take delayed scales from.
        assert float(cosine) > (0.7 if recipe == "delayed" else 0.9)
    margins = [found[phase]["reward_margin"] for phase in ("evaluated", "trained")]
    if recipe == "delayed":
        assert margins[1] != 0.0  # as the start of such a run says
    else:
        assert margins == [0.0, 0.0]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_groups_cut_over_rows(recipe: str, model: Path, te_ranks: Any) -> None:
    """A row gives the same numbers in both passes; margins are 0, and another packing's gradient is near."""
    whole, split = (
        te_ranks(1).run(step_zero, model, layout(recipe, max_tokens=tokens))[0] for tokens in (512, 128)
    )
    assert whole["split"] == 0 < split["split"]
    assert [split[phase]["reward_margin"] for phase in ("evaluated", "trained")] == [0.0, 0.0]
    assert split["trained"]["loss"] == pytest.approx(whole["trained"]["loss"], rel=1e-6)
    cosine = torch.cosine_similarity(split["gradient"], whole["gradient"], dim=0)
    print(f"{recipe}: gradient of split groups, cosine {cosine:.4f}")
    assert float(cosine) > 0.97


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_stages_have_the_scales_of_one_rank(recipe: str, model: Path, te_ranks: Any) -> None:
    """To the last bit: a stage has whole tensors."""
    one, two = (te_ranks(world).run(step_zero, model, layout(recipe, pp=world))[0] for world in (1, 2))
    assert torch.equal(one["logps"], two["logps"])
    assert one["trained"]["loss"] == pytest.approx(two["trained"]["loss"], rel=1e-6)


def test_blocks_do_not_depend_on_other_tokens(model: Path, te_ranks: Any) -> None:
    """What a token is scaled with in the forward pass are blocks of its own: at every cut of rows the same numbers."""
    whole, *others = (
        te_ranks(world).run(step_zero, model, layout("blockwise", cp=world, max_tokens=tokens))[0]
        for world, tokens in ((1, 512), (1, 128), (2, 512))
    )
    for other in others:
        difference = (other["logps"] - whole["logps"]).abs().max()
        print(f"log-probs differ by at most {difference:.1e}")
        assert float(difference) < 1e-3


def test_layers_may_stay_in_bf16(model: Path, bf16: dict[str, Any], te_ranks: Any) -> None:
    """The more of them, the nearer."""
    errors = []
    for kept in (0, 2, 3):
        wanted = layout("tensorwise", more={"first_bf16": (kept + 1) // 2, "last_bf16": kept // 2})
        found = te_ranks(1).run(step_zero, model, wanted)[0]
        errors.append(float((found["logps"] - bf16["logps"]).abs().mean()))
    assert errors[0] > errors[2] > 0, errors


def casts_by_blocks() -> list[tuple[torch.Tensor, ...]]:
    """(values, their cast, what Transformer Engine and what this package's helper read from it) in every way."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    generator = torch.Generator().manual_seed(0)
    found: list[tuple[torch.Tensor, ...]] = []
    for shape in ((256, 384), (2, 40, 200), (7, 128)):
        # Columns of very different sizes, a row of zeros, and one number so large that a tensor's scale would lose all.
        values = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])
        values[..., 0, :] = 0.0
        for dimensions in (1, 2):
            for by_columns in (False, True):
                quantizer = Float8BlockQuantizer(
                    DType.kFloat8E4M3,
                    rowwise=not by_columns,
                    columnwise=by_columns,
                    block_scaling_dim=dimensions,
                )
                cast = quantizer(values)
                scales = cast._columnwise_scale_inv if by_columns else cast._rowwise_scale_inv
                assert tuple(scales.shape) == quantizer.get_scale_shape(values.shape, by_columns)
                found.append(
                    (values, cast.dequantize(), block_scaling.values(cast, by_columns), scales.clone())
                )
    return found


def test_blocks_are_laid_out_as_transformer_engine_reads_them(te_ranks: Any) -> None:
    """Its own `dequantize` is Python; the casts are ours. Each number is off by at most half a step of e4m3."""
    for values, theirs, ours, scales in te_ranks(1).run(casts_by_blocks)[0]:
        assert torch.equal(theirs, ours)
        used = scales[scales > 0]
        assert torch.equal(used, used.log2().round().exp2())
        # Half a step is 2^-4 of a number, or 2^-10 of the block's scale, which takes its largest number to 224 or more.
        for given, found in zip(values.split(128, -1), ours.split(128, -1), strict=True):
            step = given.abs() / 16 + 2.0**-10 * given.abs().max() / 224
            assert bool(((found - given).abs() <= step).all())
        assert bool((ours != values).any())
