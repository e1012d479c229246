"""Masters on real optimizers: the same at every layout, and the model before the first step is untouched."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpo_megatron.conversion.load import global_parameter_names
from mpo_megatron.conversion.names import by_megatron_name, entries
from mpo_megatron.conversion.transforms import Cut
from mpo_megatron.model.architecture import read_architecture
from mpo_megatron.model.provider import unwrap
from tests.distributed.jobs import Layout, build, logps
from tests.helpers.models import make_model

SIZES = [3, 2]
BF16 = Layout(precision=torch.bfloat16)
LAYOUTS = {
    "dp2, distributed optimizer": (2, replace(BF16, distributed_optimizer=True)),
    "tp2": (2, replace(BF16, tp=2)),
    "pp2": (2, replace(BF16, pp=2)),
    "pp2 vpp2": (2, replace(BF16, pp=2, vpp=2)),
    "tp2 dp2, distributed optimizer": (4, replace(BF16, tp=2, distributed_optimizer=True)),
}


def masters(
    folder: Path, wanted: Layout, dithered: bool
) -> tuple[Tensor, dict[tuple[str, int], list[Any]], list[str]]:
    """(log-probs, this rank's parts of masters by parameter and tensor-parallel rank, bf16 weights that they miss)."""
    from mpo_megatron.training.masters import first_place, place_masters

    model = build(folder, SIZES, wanted)
    models = [unwrap(chunk) for chunk in model.chunks]
    if dithered:
        place_masters(models, model.optimizer, model.architecture, model.layout, folder, seed=5)
    parts: dict[tuple[str, int], list[Any]] = {}
    missed = []
    for inner in models:
        for name, parameter in global_parameter_names(inner).items():
            master: Any = getattr(parameter, "main_param", None)
            if master is None:
                continue
            start = first_place(parameter, model.optimizer)
            flat = master.detach().flatten().clone()
            parts[name, model.layout.tp_rank] = [start, flat, parameter.shape]
            if not torch.equal(flat.bfloat16(), parameter.detach().flatten()[start : start + len(flat)]):
                missed.append(name)
    return logps(model), parts, missed


def whole(folder: Path, tp: int, ranks: list[Any]) -> dict[str, Tensor]:
    """The masters in the shapes of the Hugging Face tensors, put together of all ranks' parts."""
    architecture = read_architecture(folder)
    shards: dict[tuple[str, int], Tensor] = {}
    for _, parts, _ in ranks:
        for key, (start, flat, shape) in parts.items():
            shard = shards.setdefault(key, torch.full(shape, float("nan")))
            shard.view(-1)[start : start + len(flat)] = flat
    found: dict[str, Tensor] = {}
    table = by_megatron_name(architecture)
    for name in {name for name, _ in shards}:
        held = [shards[name, rank] for rank in range(tp)]
        joined = table[name].kind.join(held, Cut(architecture, held[0].size(0) * tp, 0, tp))
        for source, tensor in zip(table[name].hugging_face, joined, strict=True):
            assert not tensor.isnan().any()
            assert torch.equal(found.setdefault(source, tensor), tensor), f"copies of {source} differ"
    return found


@pytest.fixture(scope="module", params=["qwen2 tied", "qwen3_moe"])
def one_rank(request: pytest.FixtureRequest, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    family = request.param.split()[0]
    make_model(folder, family, dtype=torch.bfloat16, tie_word_embeddings=family == "qwen2")
    plain, dithered = (ranks(1).run(masters, folder, BF16, on) for on in (False, True))
    return folder, plain, dithered


def test_nothing_is_seen_before_the_first_step(one_rank: Any) -> None:
    folder, plain, dithered = one_rank
    assert torch.equal(plain[0][0], dithered[0][0])
    assert dithered[0][2] == []
    before, after = whole(folder, 1, plain), whole(folder, 1, dithered)
    expected = {source for entry in entries(read_architecture(folder)) for source in entry.hugging_face}
    assert set(after) == expected
    for name, values in after.items():
        assert float((values != before[name]).float().mean()) > 0.99, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_masters_at_every_layout(name: str, one_rank: Any, ranks: Any) -> None:
    folder, _, dithered = one_rank
    world, layout = LAYOUTS[name]
    plain, found = (ranks(world).run(masters, folder, layout, on) for on in (False, True))
    assert torch.equal(plain[0][0], found[0][0])  # log-probs
    assert all(missed == [] for *_, missed in found)
    expected, ours = whole(folder, 1, dithered), whole(folder, layout.tp, found)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masters_have_what_the_folder_has_beyond_bf16(dtype: torch.dtype, ranks: Any, tmp_path: Path) -> None:
    """At one rank and over two replicas: float32 values as they are, float16 ones within their own rounding."""
    make_model(tmp_path, "qwen2", dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    for world, layout in (
        (1, BF16),
        (2, replace(BF16, distributed_optimizer=True)),
        (2, replace(BF16, tp=2)),
    ):
        found = ranks(world).run(masters, tmp_path, layout, True)
        assert all(missed == [] for *_, missed in found)
        ours = whole(tmp_path, layout.tp, found)
        assert ours.keys() == stored.keys()
        for name, values in ours.items():
            assert torch.equal(values.to(dtype), stored[name]), name
            if dtype == torch.float16:
                assert float((values != stored[name].float()).float().mean()) > 0.99, name


def test_a_float32_folder_of_bf16_weights_is_taken_as_bf16(one_rank: Any, ranks: Any, tmp_path: Path) -> None:
    folder, _, dithered = one_rank
    copy = tmp_path / "float32"
    shutil.copytree(folder, copy)
    weights = {name: tensor.float() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    found = ranks(1).run(masters, copy, BF16, True)
    expected, ours = whole(folder, 1, dithered), whole(copy, 1, found)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_masters_of_transformer_engines_layers_and_optimizer(
    world: int, ranks: Any, te_ranks: Any, tmp_path: Path
) -> None:
    """Its layers name the norms otherwise; its FusedAdam updates Megatron's masters, as torch's Adam does."""
    folder = make_model(tmp_path, "qwen2", dtype=torch.bfloat16)
    local = ranks(1).run(masters, folder, BF16, True)
    layout = replace(BF16, distributed_optimizer=world > 1, options={"transformer_engine": True})
    found = te_ranks(world).run(masters, folder, layout, True)
    assert all(missed == [] for *_, missed in found)
    expected, ours = whole(folder, 1, local), whole(folder, 1, found)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
