"""Transformer Engine's layers against Megatron's local ones: the same model, at every layout, without a GPU.

Its own Python on CPU ranks (tests.helpers.transformer_engine), in float32. What is compared with is one rank of local
layers: log-probs, loss, gradient of every parameter, and log-probs after an update, by its FusedAdam on one side and
torch's Adam on the other.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.conversion import load as load_module
from mpo_megatron.conversion.convert import export_checkpoint
from mpo_megatron.conversion.names import by_megatron_name
from mpo_megatron.model.rotary import PositionRotaryEmbedding
from tests.distributed.faults import replaced
from tests.distributed.jobs import Layout, build, logps, steps_and_gradients
from tests.distributed.test_checkpoint import FORMS, train
from tests.distributed.test_convert import save_and_export
from tests.helpers.models import make_model

SIZES = [2, 9, 3, 5]
SEED = 95  # as in test_layouts: rows of 40 tokens hold no whole group
BUDGETS = {"whole": 112, "split": 40}
RTOL = 2e-5
TE: dict[str, Any] = {"transformer_engine": True}
UNFUSED = {"fuse_weight_gradients": False}
ATTENTION = {"attention_backend": "te"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
CASES = {
    "one rank": (1, Layout(options=TE)),
    "one rank, gradients not fused": (1, Layout(options=TE | UNFUSED)),
    "one rank, its attention": (1, Layout(options=TE | ATTENTION)),
    "one rank, full recompute": (1, Layout(options=TE | FULL)),
    "one rank, selective recompute": (1, Layout(options=TE | SELECTIVE)),
    "tp2": (2, Layout(tp=2, options=TE)),
    "tp2, gradients not fused": (2, Layout(tp=2, options=TE | UNFUSED)),
    "tp2, its attention, full recompute": (2, Layout(tp=2, options=TE | ATTENTION | FULL)),
    "pp2": (2, Layout(pp=2, options=TE)),
    "pp2 vpp2": (2, Layout(pp=2, vpp=2, options=TE)),
    "tp2 pp2": (4, Layout(tp=2, pp=2, options=TE)),
    "cp2": (2, Layout(cp=2, options=TE)),
    "dp2, distributed optimizer": (2, Layout(distributed_optimizer=True, options=TE)),
    "dp2, overlap": (2, Layout(distributed_optimizer=True, overlap=True, options=TE)),
    "dp2 pp2, overlap": (4, Layout(pp=2, distributed_optimizer=True, overlap=True, options=TE)),
}


def run(
    pool: Any, model: Path, layout: Layout, output: Path, sizes: list[int] = SIZES
) -> tuple[list[Any], dict[str, Any]]:
    """(each rank's values, gradients by budget) of a step of W-MPO."""
    results = pool.run(steps_and_gradients, model, sizes, SEED, layout, BUDGETS, ["wmpo"], output)
    found = {
        folder.name.split("-")[0]: load_file(folder / "model.safetensors") for folder in output.iterdir()
    }
    return results, found


@pytest.fixture(scope="module", params=["llama"])
def local(request: pytest.FixtureRequest, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of a family with tied or untied embeddings, and what one rank of local layers finds."""
    family, *tied = request.param.split()
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, family, tie_word_embeddings=tied != ["untied"], initializer_range=0.15)
    (result,), gradients = run(ranks(1), folder, Layout(), tmp_path_factory.mktemp("local"))
    return folder, result, gradients


def compare(
    results: list[Any], gradients: dict[str, Any], wanted: dict[str, Any], wanted_gradients: dict[str, Any]
) -> float:
    """Assert that all is as with local layers. Returns the largest difference of a gradient, relative."""
    largest = 0.0
    for result in results:
        for budget in BUDGETS:
            key = f"{budget}-wmpo"
            torch.testing.assert_close(result["logps"][budget], wanted["logps"][budget], rtol=RTOL, atol=RTOL)
            assert result["metrics"][key] == pytest.approx(wanted["metrics"][key], rel=RTOL, abs=RTOL)
            assert result["norm"][key] == pytest.approx(wanted["norm"][key], rel=RTOL)
        torch.testing.assert_close(result["after"], wanted["after"], rtol=1e-4, atol=1e-3)
        assert not torch.allclose(result["after"], result["logps"]["whole"], rtol=1e-4, atol=1e-3)
    for budget in BUDGETS:
        assert gradients[budget].keys() == wanted_gradients[budget].keys()
        for tensor, gradient in gradients[budget].items():
            expected = wanted_gradients[budget][tensor]
            difference = float((gradient - expected).norm() / expected.norm())
            largest = max(largest, difference)
            assert difference <= RTOL, f"{budget}: {tensor} differs by {difference:.1e}"
    return largest


@pytest.mark.parametrize("name", CASES)
def test_layers_agree(name: str, local: Any, te_ranks: Any, tmp_path: Path) -> None:
    folder, *wanted = local
    world, layout = CASES[name]
    largest = compare(*run(te_ranks(world), folder, layout, tmp_path), *wanted)
    print(f"{name}: largest difference of a gradient {largest:.1e}")


@pytest.mark.parametrize("local", ["llama untied", "qwen2", "qwen3 untied"], indirect=True)
@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_families_agree(name: str, local: Any, te_ranks: Any, tmp_path: Path) -> None:
    """Untied embeddings, biases, and norms of queries and keys."""
    folder, *wanted = local
    world, layout = CASES[name]
    compare(*run(te_ranks(world), folder, layout, tmp_path), *wanted)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_rank_without_a_group_takes_part(
    overlap: bool, local: Any, ranks: Any, te_ranks: Any, tmp_path: Path
) -> None:
    """One group on two data-parallel ranks."""
    folder, *_ = local
    (wanted,), gradients = run(ranks(1), folder, Layout(), tmp_path / "local", [5])
    layout = Layout(distributed_optimizer=True, overlap=overlap, options=TE)
    compare(*run(te_ranks(2), folder, layout, tmp_path / "te", [5]), wanted, gradients)


def load(folder: Path, wanted: Layout) -> torch.Tensor:
    return logps(build(folder, SIZES, wanted))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("writer", ["local", "te"])
def test_a_checkpoint_opens_under_the_other_layers(
    writer: str, tied: bool, ranks: Any, te_ranks: Any, tmp_path: Path
) -> None:
    """Saved at TP 2 by one kind and read at PP 2 by the other; the export of it is that of the live model."""
    source = make_model(tmp_path / "source", "qwen3", tie_word_embeddings=tied)
    kinds: dict[str, Any] = {"local": (ranks, {}), "te": (te_ranks, TE)}
    reader = "te" if writer == "local" else "local"
    (pool, options), (other, other_options) = kinds[writer], kinds[reader]
    saved, layout = tmp_path / "saved", Layout(tp=2, options=options)
    pool(2).run(save_and_export, source, layout, saved, tmp_path / "live")
    written = pool(2).run(load, saved / "step_0000001", layout)
    found = other(2).run(load, saved / "step_0000001", Layout(pp=2, options=other_options))
    torch.testing.assert_close(found[0], written[0], rtol=RTOL, atol=RTOL)
    export_checkpoint(saved / "step_0000001", tmp_path / "exported")
    live, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "exported"))
    assert live.keys() == exported.keys() == load_file(source / "model.safetensors").keys()
    assert all(torch.equal(live[name], exported[name]) for name in live)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("writer", ["local", "te"])
def test_a_run_resumes_under_the_other_layers(
    writer: str, form: str, ranks: Any, te_ranks: Any, tmp_path: Path
) -> None:
    """Their parameters are in another order, and so in other places of the optimizer's buckets."""
    source = make_model(tmp_path / "source", "qwen3")
    kinds: dict[str, Any] = {"local": (ranks, {}), "te": (te_ranks, TE)}
    (pool, options), (other, other_options) = kinds[writer], kinds["te" if writer == "local" else "local"]
    layout = Layout(distributed_optimizer=True, options=options)
    ((expected, _), _) = pool(2).run(train, source, layout, 4, None, None)
    pool(2).run(train, source, layout, 2, None, tmp_path / "saved", form)
    layout = Layout(distributed_optimizer=True, options=other_options)
    ((resumed, _), _) = other(2).run(train, source, layout, 2, tmp_path / "saved", None)
    torch.testing.assert_close(resumed, expected, rtol=1e-4, atol=1e-3)


def run_with_fault(fault: str, *arguments: Any) -> Any:
    """A step with one of these in place; called on the ranks."""
    with te_faults[fault]():
        return steps_and_gradients(*arguments)


def _wrong_norm() -> Any:
    """The norm before attention and the one before the feed-forward part have each other's names."""
    return replaced(load_module, "by_megatron_name", _with_swapped_norms)


def _with_swapped_norms(architecture: Any) -> dict[str, Any]:
    table = by_megatron_name(architecture)
    for i in range(architecture.num_layers):
        layer = f"decoder.layers.{i}."
        first, second = (
            f"{layer}{part}.layer_norm_weight" for part in ("self_attention.linear_qkv", "mlp.linear_fc1")
        )
        table[first], table[second] = table[second], table[first]
    return table


def _rotary_by_place() -> Any:
    """The fused rotary embedding gets angles of places in the row."""

    def by_place(self: Any, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return forward(self, torch.arange(position_ids.numel()))

    forward = PositionRotaryEmbedding.forward
    return replaced(PositionRotaryEmbedding, "forward", by_place)


def _gradient_misses_main_grad() -> Any:
    """Autograd's own gradient of a weight that was not fused is taken to be in main_grad already."""
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    def marked(self: Any, x: torch.Tensor) -> Any:
        self.weight.grad_added_to_main_grad = True
        return forward(self, x)

    forward = TERowParallelLinear.forward
    return replaced(TERowParallelLinear, "forward", marked)


te_faults = {
    "wrong norm": _wrong_norm,
    "rotary by place": _rotary_by_place,
    "gradient misses main_grad": _gradient_misses_main_grad,
}


@pytest.mark.parametrize("fault", te_faults)
def test_a_fault_is_found(fault: str, local: Any, te_ranks: Any, tmp_path: Path) -> None:
    """Each trains without an error, and the comparison fails."""
    folder, *wanted = local
    layout = Layout(options=TE | UNFUSED)
    arguments = (folder, SIZES, SEED, layout, BUDGETS, ["wmpo"], tmp_path)
    results = te_ranks(1).run(run_with_fault, fault, *arguments)
    gradients = {
        path.name.split("-")[0]: load_file(path / "model.safetensors") for path in tmp_path.iterdir()
    }
    with pytest.raises(AssertionError):
        compare(results, gradients, *wanted)
