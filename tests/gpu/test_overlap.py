"""Three steps of the main job, one way and another: the same losses, norms and weights.

Each step is one group on two data-parallel ranks, so that one of them has a row of padding alone. What differs is
whether gradients are reduced and weights gathered while others are computed, and whether the optimizer is sharded.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.gpu.conftest import Place
from tests.helpers.main_job import arguments, job, make_inputs, metrics

SHARDED = "model.optim.distributed"
OVERLAP = ("overlap_grad_reduce", "overlap_param_gather")
WAYS = {
    "sharded": ([f"{SHARDED}=true"], [f"{SHARDED}=false"]),
    "overlap": tuple([f"model.optim.{name}={on}" for name in OVERLAP] for on in ("true", "false")),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"), groups=(6, 2))


@pytest.mark.parametrize("name", WAYS)
def test_both_ways_train_alike(
    name: str, place: Place, inputs: dict[str, Path], measured: Any, tmp_path: Path
) -> None:
    pool, ways = place.ranks(2), WAYS[name]
    folders = [tmp_path / str(number) for number in range(len(ways))]
    for folder, way in zip(folders, ways, strict=True):
        common = [
            f"trainer.accelerator={place.accelerator}", "trainer.precision=32", "trainer.max_steps=3",
            "model.global_batch_size=1", "model.optim.lr=1e-3",
        ]  # fmt: skip
        assert pool.run(job, arguments(inputs, folder, *common, *way), timeout=280) == ["", ""]
    first, second = (metrics(folder) for folder in folders)
    assert [line["step"] for line in first] == [1, 2, 3] == [line["step"] for line in second]
    for what in ("loss", "grad_norm"):
        off = max(abs(a[what] - b[what]) / abs(b[what]) for a, b in zip(first, second, strict=True))
        measured(what, off, at_most=1e-5)
    one, other = (load_file(folder / "hf" / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    start = load_file(inputs["model"] / "model.safetensors")
    moved = sum(float((other[tensor] - start[tensor]).square().sum()) for tensor in other) ** 0.5
    apart = sum(float((one[tensor] - other[tensor]).square().sum()) for tensor in other) ** 0.5
    assert moved > 0
    # Adam's first steps turn the sign of a gradient near 0 into a whole step.
    measured("weights, of what they moved", apart / moved, at_most=1e-2)
