"""Layers of Megatron-core and of Transformer Engine, at layouts, against one CPU rank in float64 with repeated prompts:
log-probs, loss, gradient norm, and the gradient of every parameter.

In float32, TF32 off (tests.gpu.ranks), and in bf16. Pipelines are among the layouts: on a GPU stages free what they
have sent, and wait for the device after no transfer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import Layout, steps_and_gradients
from tests.distributed.test_layouts import FULL, SEED, SIZES
from tests.gpu.conftest import Place, on_cpu, on_gpu
from tests.helpers.models import make_llama

BUDGETS = {"whole": 112, "split": 40}
LAYOUTS = {
    "1": (1, Layout()),
    "1, full recompute": (1, Layout(options=FULL)),
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "pp2 vpp2": (2, Layout(pp=2, vpp=2)),
    "cp2": (2, Layout(cp=2)),
    "dp2": (2, Layout(distributed_optimizer=True)),
    "tp2 pp2": (4, Layout(tp=2, pp=2)),
    "tp2 cp2": (4, Layout(tp=2, cp=2)),
}
KINDS: dict[str, dict[str, Any]] = {
    "local": {},
    "te": {"transformer_engine": True},
    "te, gradients not fused": {"transformer_engine": True, "fuse_weight_gradients": False},
}
# Relative, of norms. Local layers: what float32 leaves. Transformer Engine asks for TF32 by name, and where the
# override does not reach it products have 10 bits; a mistake in layout or mask is off by 4% and more.
AT_MOST = {"local": 1e-4, "te": 5e-3, "te, gradients not fused": 5e-3}
# Of the whole gradient, of what 8 bits leave in four layers.
BF16_AT_MOST = 0.1


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tied = request.param == "tied"
    # Heads of a size that every kernel has.
    return make_llama(folder, tie_word_embeddings=tied, head_dim=64, initializer_range=0.15)


@pytest.fixture(scope="module")
def exact(model: Path, cpu: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(values, gradients) of one CPU rank, in float64."""
    wanted = Layout(shared_prompt=False, precision=torch.float64)
    (values,), gradients = run(cpu, 1, model, wanted, tmp_path_factory.mktemp("exact"), {"whole": 4096})
    return values, gradients["whole"]


def run(
    place: Place, world: int, model: Path, layout: Layout, output: Path, budgets: dict[str, int] = BUDGETS
) -> tuple[list[Any], dict[str, dict[str, torch.Tensor]]]:
    """(each rank's values, gradients by budget) of a step of W-MPO."""
    layout = replace(layout, accelerator=place.accelerator)
    pool, arguments = place.ranks(world), (model, SIZES, SEED, layout, budgets, ["wmpo"], output)
    results = pool.run(steps_and_gradients, *arguments, timeout=280)
    return results, {
        folder.name.split("-")[0]: load_file(folder / "model.safetensors") for folder in output.iterdir()
    }


def deviations(
    results: list[Any], gradients: dict[str, dict[str, torch.Tensor]], exact: tuple[Any, Any]
) -> dict[str, float]:
    """The largest of each kind over ranks and budgets: of log-probs in nats, the others relative."""
    values, wanted = exact
    metrics, norm = values["metrics"]["whole-wmpo"], values["norm"]["whole-wmpo"]
    found: dict[str, list[float]] = {name: [] for name in ("log-probs", "loss", "norm", "parameter", "all")}
    for result in results:
        assert result["padding"] == 0
        for budget, logps in result["logps"].items():
            key = f"{budget}-wmpo"
            found["log-probs"].append(float((logps.double() - values["logps"]["whole"]).abs().max()))
            found["loss"].append(abs(result["metrics"][key]["loss"] / metrics["loss"] - 1))
            found["norm"].append(abs(result["norm"][key] / norm - 1))
    for of_budget in gradients.values():
        assert of_budget.keys() == wanted.keys()
        off = {name: (of_budget[name].double() - right).norm() for name, right in wanted.items()}
        found["parameter"].append(max(float(off[name] / wanted[name].norm()) for name in wanted))
        total = sum(right.norm() ** 2 for right in wanted.values())
        found["all"].append(float((sum(one**2 for one in off.values()) / total) ** 0.5))
    # Not max(), which passes over NaN.
    return {name: float(torch.tensor(values).max()) for name, values in found.items()}


@pytest.mark.parametrize(
    ("place", "kind", "name"),
    [*(on_cpu("local", name) for name in ("1", "pp2", "pp2 vpp2")),
     *(on_gpu(kind, name) for kind in KINDS for name in LAYOUTS)],
    indirect=["place"],
)  # fmt: skip
def test_layers_give_the_gradients_of_one_rank(
    kind: str, name: str, place: Place, exact: Any, model: Path, measured: Any, tmp_path: Path
) -> None:
    world, layout = LAYOUTS[name]
    pool_options = KINDS[kind] | layout.options
    place.ranks(world)
    if kind != "local":
        place.needs_library("transformer_engine")
    found = deviations(*run(place, world, model, replace(layout, options=pool_options), tmp_path), exact)
    for what in ("log-probs", "loss", "norm", "parameter"):
        # Responses have some ten tokens of some two nats.
        measured(what, found[what], at_most=AT_MOST[kind] * (10 if what == "log-probs" else 1))


@pytest.mark.parametrize(
    ("place", "kind", "backend", "name"),
    [on_cpu("local", "sdpa", "1"),
     *(on_gpu(kind, backend, name) for kind in ("local", "te") for backend in ("sdpa", "varlen", "te")
       for name in ("1", "tp2", "pp2", "cp2"))],
    indirect=["place"],
)  # fmt: skip
def test_bfloat16_is_near(
    kind: str, backend: str, name: str, place: Place, exact: Any, model: Path, measured: Any, tmp_path: Path
) -> None:
    """bf16 weights with the distributed optimizer, and each kernel of attention in the model."""
    world, layout = LAYOUTS[name]
    place.ranks(world)
    if kind == "te":
        place.needs_library("transformer_engine")
    place.needs_attention(backend)
    options = KINDS[kind] | {"attention_backend": backend}
    layout = replace(layout, options=options, precision=torch.bfloat16, distributed_optimizer=True)
    found = deviations(*run(place, world, model, layout, tmp_path), exact)
    measured("log-probs", found["log-probs"], at_most=1.0)
    measured("norm", found["norm"], at_most=BF16_AT_MOST)
    measured("gradient", found["all"], at_most=BF16_AT_MOST)
