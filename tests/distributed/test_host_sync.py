"""A training step has the host wait for a GPU once: for its metrics, at its end.

The step is the job's own, run on one CPU rank with tests.helpers.host_sync in place, from packed rows to
`objective_pass`: model forward and backward by Megatron's schedule, objective and metrics, and where groups are split
both passes. Before it rows are packed and copied; after it come the optimizer and its gradient norm, which are
Megatron's. What Megatron's own lines do within the step is counted too, but for two things, in `MEGATRONS`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mpo_megatron.objectives.metrics import group_metrics
from mpo_megatron.objectives.registry import GroupBatch, Objective, ObjectiveResult
from mpo_megatron.training import step
from mpo_megatron.training.rank_times import RankTimes
from tests.distributed.jobs import Layout, build, logps, objective_named, step_for
from tests.helpers.host_sync import Wait, watch
from tests.helpers.models import make_llama

# (what, the line's function): a 0 that every row's number of groups takes the place of, left on the host; and one look
# at the step's number of groups before the gradients are divided by it, when all rows are through.
MEGATRONS = {("tensor", "forward_step_calc_loss"), ("_local_scalar_dense", "finalize_model_grads")}
SIZES = [2, 5, 3, 4]
# (tokens of a row, whether recomputed, forward only): rows of whole groups, and groups split over rows.
CASES = {
    "training": (256, False, False),
    "recomputation": (256, True, False),
    "split groups": (40, False, False),
    "validation": (256, False, True),
    "validation of split groups": (40, False, True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def waits_of_a_step(
    folder: Path, name: str, max_tokens: int, recompute: bool, forward_only: bool, fault: str = ""
) -> list[Wait]:
    """Of one step on one rank, with a fault in place."""
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if recompute:
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = build(folder, SIZES, Layout(max_tokens=max_tokens, options=options))
    reference = logps(model) - 1
    rows = step_for(model, name)
    assert (rows.first_pass > 0) == (max_tokens < 256 or name == "kto")
    objective, metrics = objective_named(name), group_metrics
    if fault == "item in the loss":
        objective = _with_an_item(objective)
    elif fault == "mask in the metrics":
        metrics = _with_a_mask
    times = RankTimes(model.chunks, model.layout)
    times.begin()  # a step before, whose time goes with the metrics
    times.end()
    with mock.patch.object(step, "group_metrics", metrics), watch() as found:
        values = step.objective_pass(
            model.chunks, rows, objective, reference, model.layout, forward_only=forward_only, times=times
        )
    assert ("slowest_rank" in values) != forward_only
    return found


def _with_an_item(objective: Objective) -> Objective:
    def with_an_item(batch: GroupBatch) -> ObjectiveResult:
        result = objective(batch)
        return replace(result, losses=result.losses * (1.0 if result.losses.sum().item() > 0 else 2.0))

    return with_an_item


def _with_a_mask(batch: GroupBatch, result: ObjectiveResult) -> torch.Tensor:
    preferred = result.rewards[batch.preferred].mean()
    return group_metrics(batch, result) + 0 * preferred


def before_the_transfer(found: list[Wait]) -> list[Wait]:
    """What waits before the one transfer of the metrics to the host, with which the step ends."""
    *others, last = found
    assert (last.what, last.function) == ("tolist", "_means_and_seconds")
    assert sum(wait.function == "finalize_model_grads" for wait in others) <= 1
    return [wait for wait in others if (wait.what, wait.function) not in MEGATRONS]


@pytest.mark.parametrize("name", ["wmpo", "kto"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_its_metrics_alone(case: str, name: str, model: Path, ranks: Any) -> None:
    (found,) = ranks(1).run(waits_of_a_step, model, name, *CASES[case])
    assert before_the_transfer(found) == []


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("item in the loss", ("_local_scalar_dense", "with_an_item")),
        ("mask in the metrics", ("index by a mask", "_with_a_mask")),
    ],
)
def test_a_wait_that_is_put_in_is_found(fault: str, wanted: tuple, model: Path, ranks: Any) -> None:
    (found,) = ranks(1).run(waits_of_a_step, model, "wmpo", *CASES["training"], fault)
    assert {(wait.what, wait.function) for wait in before_the_transfer(found)} == {wanted}
