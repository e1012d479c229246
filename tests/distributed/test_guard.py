"""A step whose loss or gradient is not finite changes nothing, on no rank; the run goes on, or ends as it was."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import get_model_config
from safetensors.torch import load_file

from mpo_megatron.model import provider
from mpo_megatron.training import job as building
from mpo_megatron.training.guard import NotFinite
from tests.distributed.faults import replaced
from tests.distributed.jobs import Layout, build, gradients, logps
from tests.helpers.main_job import arguments, exact, job, metrics

STEPS = 8
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "data parallel": (2, []),
    "without the distributed optimizer": (2, ["model.optim.distributed=false"]),
    "tensor parallel": (2, ["model.tensor_model_parallel_size=2"]),
    "pipeline parallel": (2, ["model.pipeline_model_parallel_size=2"]),
}


def job_with(overrides: list[str], bad_steps: list[int], value: float) -> str:
    """The main job, in which the last rank's gradient has one value that is not finite, before gradients are summed."""
    finalize, steps = provider.finalize_model_grads, 0

    def spoilt(models: list[Any], *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        steps += 1
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1 and steps in bad_steps:
            parameter = list(models[-1].parameters())[-1]
            parameter.main_grad.view(-1)[-1] = value
        finalize(models, *args, **kwargs)

    with replaced(provider, "finalize_model_grads", spoilt):
        return job(overrides)


def job_with_a_bad_reference(overrides: list[str], response: int) -> str:
    """The main job, in which the reference log-prob of one response is NaN."""
    reference = building._reference

    def spoilt(split: Any, *args: Any) -> torch.Tensor:
        values = reference(split, *args)
        if split.name == "train":
            values = values.index_fill(0, torch.tensor([response]), math.nan)
        return values

    with replaced(building, "_reference", spoilt):
        return job(overrides)


def settings(inputs: dict[str, Path], folder: Path, *more: str) -> list[str]:
    fixed = [f"trainer.max_steps={STEPS}", "trainer.precision=32", "model.global_batch_size=8"]
    return [*arguments(inputs, folder), *fixed, *more]


def found_in_one_step(folder: Path, wanted: Layout, value: float) -> list[tuple[str, list[str]]]:
    """(what, parameters) of what a step raises on this rank: whole, then with a value on the last rank alone."""
    model = build(folder, [2, 3, 2, 4], wanted)
    found: list[tuple[str, list[str]]] = []
    reference = logps(model) - 1
    finalize = get_model_config(model.chunks[0]).finalize_model_grads_func
    for spoils in (False, True):

        def spoilt(models: list[Any], *args: Any, spoils: bool = spoils, **kwargs: Any) -> None:
            if spoils and model.layout.rank == model.layout.world_size - 1:
                next(models[-1].parameters()).main_grad.view(-1)[0] = value
            finalize(models, *args, **kwargs)

        for chunk in model.chunks:
            get_model_config(chunk).finalize_model_grads_func = spoilt
        try:
            gradients(model, reference, "wmpo")
            found.append(("", []))
        except NotFinite as raised:
            found.append((raised.what, raised.parameters))
    return found


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        *((layout, math.nan) for layout in (Layout(), Layout(tp=2), Layout(pp=2))),
        *((Layout(distributed_optimizer=True), value) for value in (math.nan, -math.inf, 1e30)),
    ],
    ids=str,
)
def test_both_ranks_raise_what_is_not_finite_on_one(
    wanted: Layout, value: float, inputs: dict[str, Path], ranks: Any
) -> None:
    first, second = ranks(2).run(found_in_one_step, inputs["model"], wanted, value)
    assert first == second
    assert first[0] == ("", [])
    assert first[1][0] == "gradient"
    assert bool(first[1][1]) == (value != 1e30)


@pytest.fixture(scope="module")
def unharmed(inputs: dict[str, Path], ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unharmed") / "run"
    assert ranks(1).run(job, settings(inputs, folder), timeout=240) == [""]
    return folder


@pytest.fixture(scope="module")
def left_out(inputs: dict[str, Path], ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one rank, with steps 3 and 6 left out."""
    folder = tmp_path_factory.mktemp("left_out") / "run"
    assert ranks(1).run(job_with, settings(inputs, folder), [3, 6], math.nan, timeout=240) == [""]
    return folder


def weights(folder: Path) -> torch.Tensor:
    return torch.cat(
        [values.flatten() for _, values in sorted(load_file(folder / "hf" / "model.safetensors").items())]
    )


def test_a_step_that_is_left_out_changes_nothing(left_out: Path, unharmed: Path) -> None:
    before, after = exact(unharmed), exact(left_out)
    assert after[:2] == before[:2]
    assert [line["step"] for line in after] == [1, 2, 4, 5, 7, 8]
    # Step 4 sees the weights of step 3's start; its learning rate is its own.
    assert after[2]["loss"] != before[3]["loss"]
    assert [line["lr"] for line in after] == [line["lr"] for line in before if line["step"] not in (3, 6)]
    assert weights(left_out).isfinite().all()
    assert not torch.equal(weights(left_out), weights(unharmed))


@pytest.mark.parametrize(
    ("layout", "value"),
    [*((layout, math.nan) for layout in LAYOUTS), *(("data parallel", value) for value in (math.inf, 1e30))],
)
def test_all_ranks_leave_out_what_is_not_finite_on_one(
    layout: str, value: float, inputs: dict[str, Path], left_out: Path, ranks: Any, tmp_path: Path
) -> None:
    """A value whose square is beyond float32 counts: the norm for clipping is infinite."""
    world, more = LAYOUTS[layout]
    overrides = settings(inputs, tmp_path / "run", *more)
    assert ranks(world).run(job_with, overrides, [3, 6], value, timeout=240) == [""] * world
    expected, found = exact(left_out), exact(tmp_path / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    # The two steps that are left out change each of these by 2e-3 to 2.4. A norm in float32, after six updates, is 3e-5
    # of itself from one rank's at two tensor-parallel ones.
    for name, rtol in (("loss", 0.0), ("reward_margin", 0.0), ("grad_norm", 1e-4)):
        wanted = [line[name] for line in expected]
        assert [line[name] for line in found] == pytest.approx(wanted, rel=rtol, abs=2e-5)
    skipped = metrics(tmp_path / "run", "skipped")
    assert [line["step"] for line in skipped] == [3, 6]
    for line, reference in zip(skipped, metrics(left_out, "skipped"), strict=True):
        assert line["groups"] == reference["groups"]
        assert len(line["groups"]) == 8
        assert line["reason"].startswith("the gradient is ")
        assert ("parameters" in line) == (value != 1e30)
        assert "of_rows_not_finite" not in line


@pytest.mark.parametrize("layout", ["one rank", "data parallel", "pipeline parallel"])
def test_the_groups_of_a_loss_that_is_not_finite_are_named(
    layout: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    world, more = LAYOUTS[layout]
    overrides = settings(inputs, tmp_path / "run", "model.max_tokens_per_micro_batch=128", *more)
    assert ranks(world).run(job_with_a_bad_reference, overrides, 17, timeout=240) == [""] * world
    sizes = [len(json.loads(line)["responses"]) for line in inputs["train"].read_text().splitlines()]
    bad = f"g{np.searchsorted(np.cumsum(sizes), 17, side='right')}"
    skipped = metrics(tmp_path / "run", "skipped")
    # Once an epoch of five steps.
    assert len(skipped) in (1, 2)
    for line in skipped:
        assert line["reason"] == "the loss is nan"
        assert bad in line["of_rows_not_finite"]
        assert set(line["of_rows_not_finite"]) < set(line["groups"])
    assert len(metrics(tmp_path / "run")) == STEPS - len(skipped)
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))


@pytest.mark.parametrize("layout", ["data parallel", "tensor parallel"])
def test_a_run_that_is_given_up_resumes_as_if_nothing_had_been(
    layout: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    world, more = LAYOUTS[layout]
    whole = settings(inputs, tmp_path / "whole", *more)
    assert ranks(world).run(job, whole, timeout=240) == [""] * world
    overrides = settings(inputs, tmp_path / "run", "exp_manager.resume_if_exists=true", *more)
    errors = ranks(world).run(job_with, overrides, [2, 5, 6, 7], math.nan, timeout=240)
    assert len(set(errors)) == 1
    saved = tmp_path / "run" / "checkpoints" / "step_0000004"
    assert errors[0].startswith(
        "the gradient of steps 5 to 7 is nan, and trainer.max_skipped_steps=3 ends the run; the state before them is "
        f"in {saved}. Look at its groups: g"
    )
    assert errors[0].endswith(", or lower model.optim.lr")
    assert saved.is_dir()
    # Without what spoilt it: as a run that left out step 2 alone.
    assert ranks(world).run(job, overrides, timeout=240) == [""] * world
    alone = settings(inputs, tmp_path / "alone", *more)
    assert ranks(world).run(job_with, alone, [2], math.nan, timeout=240) == [""] * world
    assert exact(tmp_path / "run") == exact(tmp_path / "alone")
    assert torch.equal(weights(tmp_path / "run"), weights(tmp_path / "alone"))
    assert [line["step"] for line in metrics(tmp_path / "run", "skipped")] == [2]


@pytest.mark.parametrize(
    ("more", "bad", "way_back"),
    [
        (
            [],
            [1, 2, 3],
            "steps 1 to 3 is nan, and trainer.max_skipped_steps=3 ends the run; nothing was",
        ),
        (
            ["trainer.max_skipped_steps=1"],
            [2],
            "step 2 is nan, and trainer.max_skipped_steps=1 ends the run; the state",
        ),
        (["trainer.save_at_end=false"], [2, 3, 4], "ends the run; no state is saved, as configured. Look at"),
    ],
)
def test_what_is_said_of_a_run_that_is_given_up(
    more: list[str], bad: list[int], way_back: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    (error,) = ranks(1).run(job_with, settings(inputs, tmp_path / "run", *more), bad, math.nan, timeout=240)
    assert way_back in error
    assert "\n" not in error
