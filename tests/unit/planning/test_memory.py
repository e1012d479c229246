"""Bytes by hand for sizes at which they can be worked out, and what they must do when a layout changes."""

from dataclasses import replace
from typing import Any

import pytest

from mpo_megatron.benchmarks.models import LLAMA3_8B
from mpo_megatron.benchmarks.plan import ultrafeedback_like
from mpo_megatron.planning.memory import chunk_of, largest_stage, stage_memory, step_memory, warmup_passes
from mpo_megatron.planning.profile import even_groups, plan_rows
from mpo_megatron.planning.run import FULL, Recompute, Run, different_stages


def memory(run: Run, groups: Any = None) -> Any:
    groups = groups or even_groups(512, [512], 4, 64)
    return step_memory(LLAMA3_8B, run, plan_rows(groups, run, LLAMA3_8B.cost_model))


def test_eighteen_bytes_a_parameter_on_one_rank() -> None:
    """2 for the weight, 4 for the gradient, 12 for master and moments; padding is below a millionth."""
    (stage,) = memory(Run())
    assert stage.parameters == LLAMA3_8B.num_parameters == 8_030_261_248
    state = stage.weights + stage.gradients + stage.optimizer
    assert state == pytest.approx(18 * stage.parameters, rel=1e-6)


def test_float32_has_no_masters() -> None:
    (stage,) = memory(Run(element=4, distributed_optimizer=False))
    assert (stage.weights, stage.gradients, stage.optimizer) == (
        4 * stage.parameters,
        4 * stage.parameters,
        8 * stage.parameters,
    )


@pytest.mark.parametrize(("cp", "dp"), [(1, 8), (2, 4)])
def test_the_distributed_optimizer_shares_its_state_among_all_replicas(cp: int, dp: int) -> None:
    (stage,), (alone,) = memory(Run(cp=cp, dp=dp)), memory(Run())
    assert stage.optimizer == pytest.approx(alone.optimizer / 8, rel=1e-6)
    assert stage.gradients == pytest.approx(alone.gradients, rel=1e-6)
    (whole,) = memory(Run(cp=cp, dp=dp, distributed_optimizer=False))
    assert whole.optimizer == 12 * stage.parameters


def test_early_stages_hold_more_rows() -> None:
    stages = memory(Run(pp=4))
    assert [stage.in_flight for stage in stages] == [4, 3, 2, 1]
    kept = [stage.activations for stage in stages[:3]]
    assert kept[0] == pytest.approx(4 * kept[1] / 3) == pytest.approx(2 * kept[2])


def test_fp8_keeps_two_casts_of_each_weight() -> None:
    for run in (Run(), Run(tp=2, pp=2)):
        for plain, cast in zip(memory(run), memory(replace(run, fp8=True)), strict=True):
            assert cast.weights - plain.weights == 2 * plain.parameters
            assert cast.total - plain.total == 2 * plain.parameters


def test_recomputation_orders_memory() -> None:
    """Attention keeps no scores and its inputs once: computed again it keeps more, since values are then a view."""
    none, scores, layers = (
        memory(Run(recompute=recompute))[0].activations
        for recompute in (Recompute(), Recompute("selective"), FULL)
    )
    assert layers < none < scores


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (2, 2), (4, 1), (4, 2), (8, 4)])
def test_no_stage_is_above_those_that_the_search_looks_at(pp: int, vpp: int) -> None:
    run = Run(pp=pp, vpp=vpp, tp=2, sequence_parallel=True, dp=2)
    shape = plan_rows(ultrafeedback_like(32, 0), run, LLAMA3_8B.cost_model)
    everywhere = [stage_memory(LLAMA3_8B, run, shape, stage).total for stage in range(pp)]
    assert largest_stage(LLAMA3_8B, run, shape).total == max(everywhere)
    assert different_stages(replace(run, pp=1)) == [0]


def test_warm_up_of_the_schedules() -> None:
    """Of 1F1B and of the interleaved schedule, at 4 stages."""
    assert [warmup_passes(Run(pp=4), stage, 8) for stage in range(4)] == [3, 2, 1, 0]
    assert [warmup_passes(Run(pp=4, vpp=2), stage, 8) for stage in range(4)] == [10, 8, 6, 4]
    assert warmup_passes(Run(pp=4), 0, 2) == 2
    assert [chunk_of(Run(pp=2, vpp=2), k) for k in range(6)] == [0, 0, 1, 1, 0, 0]
