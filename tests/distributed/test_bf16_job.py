"""The main job in bf16: where masters begin, what is said of it, resume bit for bit, and exports of the masters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.conversion.convert import export_checkpoint
from tests.helpers.main_job import (
    arguments,
    exact,
    job,
    job_killed_after,
    make_inputs,
    metrics,
    printed,
)
from tests.helpers.models import make_model

BF16 = ("trainer.precision=bf16", "model.optim.master_weights=auto", "trainer.max_steps=6",
        "model.export_dtype=float32")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    changes: dict[str, Any] = {"dtype": torch.bfloat16, "max_position_embeddings": 512}
    inputs = make_inputs(folder, make_model(folder / "llama", "llama", **changes))
    return {**inputs, "experts": make_model(folder / "experts", "qwen3_moe", **changes)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("world", "more"),
    [(1, []), (2, []), (4, ["model.tensor_model_parallel_size=2", "model.optim.distributed=false"])],
    ids=["1", "dp2", "tp2-dp2"],
)
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(
    world: int, more: list[str], inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    overrides = [*BF16, *more, "trainer.save_interval=2", "exp_manager.resume_if_exists=true"]
    straight, broken = (arguments(inputs, tmp_path / name, *overrides) for name in ("straight", "broken"))
    assert ranks(world).run(job, straight, timeout=240) == [""] * world
    stopped = ranks(world).run(job_killed_after, broken, 3, tmp_path / "lines", timeout=240)
    assert stopped == ["stopped"] * world
    assert ranks(world).run(job, broken, timeout=240) == [""] * world
    assert metrics(tmp_path / "straight")[0]["reward_margin"] == 0.0
    assert metrics(tmp_path / "straight", "validation")[0]["reward_margin"] == 0.0
    for split in ("train", "validation"):
        ours, theirs = exact(tmp_path / "broken", split), exact(tmp_path / "straight", split)
        assert len(ours) >= 2
        assert ours == theirs
    end, expected = weights(tmp_path / "broken" / "hf"), weights(tmp_path / "straight" / "hf")
    assert all(torch.equal(end[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("world", "model", "more"),
    [
        (2, "model", []),
        (4, "model", ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]),
        (2, "model", ["model.tensor_model_parallel_size=2", "model.optim.distributed=false"]),
        (4, "experts", ["model.expert_model_parallel_size=2"]),
    ],
    ids=["dp2", "tp2-pp2", "tp2, plain optimizer", "ep2-dp2"],
)
def test_masters_are_exported_whole(
    world: int, model: str, more: list[str], inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """At the end, beside the run, and of its checkpoint later: the same bits, which round to the bf16 weights."""
    overrides = arguments({**inputs, "model": inputs[model]}, tmp_path / "run", *BF16, *more,
                          "model.export_at_save=true", "trainer.max_steps=2")  # fmt: skip
    assert ranks(world).run(job, overrides, timeout=240) == [""] * world
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000002"
    export_checkpoint(checkpoint, tmp_path / "later", dtype=torch.float32)
    export_checkpoint(checkpoint, tmp_path / "bf16")
    end, bf16 = weights(tmp_path / "run" / "hf"), weights(tmp_path / "bf16")
    assert end.keys() == bf16.keys() == weights(inputs[model]).keys()
    for folder in (tmp_path / "later", tmp_path / "run" / "exports" / "step_0000002"):
        found = weights(folder)
        assert found.keys() == end.keys()
        assert all(torch.equal(found[name], end[name]) for name in end)
    for name, values in end.items():
        assert values.dtype == torch.float32
        assert torch.equal(values.bfloat16(), bf16[name]), name
        assert float((values != bf16[name].float()).float().mean()) > 0.99, name


def test_float32_weights_are_exported_in_bf16(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    more = ["model.export_dtype=bf16", "trainer.max_steps=1"]
    assert ranks(1).run(job, arguments(inputs, tmp_path, *more), timeout=240) == [""]
    export_checkpoint(tmp_path / "checkpoints" / "step_0000001", tmp_path / "float32")
    ours, whole = weights(tmp_path / "hf"), weights(tmp_path / "float32")
    assert all(torch.equal(ours[name], whole[name].bfloat16()) for name in whole)
    assert ours["model.norm.weight"].dtype == torch.bfloat16 != whole["model.norm.weight"].dtype


def test_small_updates_show_from_the_first_step(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    """As many weights move as an update has of a bf16 unit; from the grid almost none do, as the first lines say."""
    moved, lines = {}, {}
    for choice in ("auto", "rounded"):
        more = [*BF16, f"model.optim.master_weights={choice}", "model.optim.lr=2e-6", "trainer.max_steps=3",
                "model.optim.sched.name=Constant", "model.optim.sched.warmup_ratio=0"]  # fmt: skip
        (text,) = ranks(1).run(printed, arguments(inputs, tmp_path / choice, *more), timeout=240)
        (lines[choice],) = (line for line in text.splitlines() if line.startswith("masters"))
        found = metrics(tmp_path / choice)
        assert (
            found[0]["reward_margin"] == metrics(tmp_path / choice, "validation")[0]["reward_margin"] == 0.0
        )
        moved[choice] = [line["moved_fraction"] for line in found]
    assert lines["auto"].startswith(
        "masters     within the rounding of the bf16 weights; at the weights, an update of"
    )
    assert "would not show in 9" in lines["rounded"]
    assert lines["rounded"].endswith("model.optim.master_weights=auto mends that")
    start = torch.cat([tensor.flatten() for tensor in weights(inputs["model"]).values()])
    unit = (start.view(torch.int16) + 1).view(torch.bfloat16).float() - start.float()
    expected = float((2e-6 / unit.abs()).clamp(max=1).mean())
    assert moved["auto"][0] == pytest.approx(expected, rel=0.2)
    assert moved["auto"][0] > 2 * moved["rounded"][0]


def test_float32_has_no_masters(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    (text,) = ranks(1).run(printed, arguments(inputs, tmp_path, "trainer.max_steps=1"), timeout=240)
    assert not [line for line in text.splitlines() if line.startswith("masters")]
    assert "moved_fraction" not in metrics(tmp_path)[0]
