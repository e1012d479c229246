"""The search over layouts, chips, and expected times."""

import math
from dataclasses import replace

import pytest

from mpo_megatron.benchmarks.models import LLAMA3_8B
from mpo_megatron.errors import ConfigError
from mpo_megatron.planning.flops import step_flops
from mpo_megatron.planning.hardware import NETWORK, Machine, find_gpu, known_gpu
from mpo_megatron.planning.memory import RESERVED, step_memory
from mpo_megatron.planning.performance import groups_per_second, step_time
from mpo_megatron.planning.profile import even_groups, plan_rows
from mpo_megatron.planning.run import FULL, Run
from mpo_megatron.planning.search import Found, search

GROUPS = even_groups(512, [300, 700], 4, 32)
H100 = known_gpu("H100")


def multiple_of(tp: int) -> int:
    return math.lcm(tp, 64)


@pytest.fixture(scope="module")
def found() -> Found:
    return search(LLAMA3_8B, Run(), GROUPS, Machine(H100, 16), 0.6, multiple_of)


def test_what_is_found_fits_and_can_be_run(found: Found) -> None:
    assert len(found.candidates) > 50
    for one in found.candidates:
        assert one.run.world == 16
        assert max(s.total for s in step_memory(LLAMA3_8B, one.run, one.shape)) == one.memory.total
        assert one.memory.total <= H100.memory - RESERVED
        if one.run.vpp > 1:
            assert one.shape.rows_per_rank % one.run.pp == 0


def test_the_best_comes_first(found: Found) -> None:
    speeds = [one.time.groups_per_second for one in found.candidates]
    assert speeds == sorted(speeds, reverse=True)
    machine = Machine(H100, 16)
    assert all(0 < one.time.mfu(machine) < 0.6 for one in found.candidates)


def test_reasons_are_grouped() -> None:
    """Of 40 GB, 6 bytes for each of 8 billion parameters beside the shared state are too many; few lines say so."""
    found = search(LLAMA3_8B, Run(), GROUPS, Machine(replace(H100, memory=40e9), 16), 0.6, multiple_of)
    assert found.candidates
    assert 0 < len(found.refused) < 8
    assert sum(refused.count for refused in found.refused) > len(found.refused)
    assert any("GiB" in refused.reason and "by" in refused.example for refused in found.refused)
    odd = replace(LLAMA3_8B, num_layers=30, num_kv_heads=2)
    reasons = [r.reason for r in search(odd, Run(), GROUPS, Machine(H100, 16), 0.6, multiple_of).refused]
    assert any("does not divide the model's 32 attention heads" in reason for reason in reasons)
    assert "stages do not divide the 30 layers" in reasons


def test_nothing_fits_a_small_chip() -> None:
    small = replace(H100, memory=8e9)
    found = search(LLAMA3_8B, Run(), GROUPS, Machine(small, 2), 0.6, multiple_of)
    assert not found.candidates
    assert sum(refused.count for refused in found.refused) > 5


def test_a_row_that_does_not_fit_the_budget_is_told() -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch=1000"):
        search(LLAMA3_8B, Run(max_tokens=1000), GROUPS, Machine(H100, 8), 0.6, multiple_of)


def time_of(run: Run, gpus: int, per_node: int = 8) -> float:
    shape = plan_rows(GROUPS, run, LLAMA3_8B.cost_model)
    return step_time(LLAMA3_8B, run, shape, Machine(H100, gpus, per_node), 0.6).seconds


def test_times_move_as_they_must() -> None:
    assert time_of(Run(recompute=FULL), 1) > time_of(Run(), 1)
    # The bubble of four stages is three rows, and of interleaved ones half of it.
    shape = plan_rows(GROUPS, Run(pp=4), LLAMA3_8B.cost_model)
    time = step_time(LLAMA3_8B, Run(pp=4), shape, Machine(H100, 4), 0.6)
    rows = shape.rows_per_rank
    assert time.bubble == pytest.approx(3 * (time.compute + time.communication) / rows)
    interleaved = plan_rows(GROUPS, Run(pp=4, vpp=2), LLAMA3_8B.cost_model)
    half = step_time(LLAMA3_8B, Run(pp=4, vpp=2), interleaved, Machine(H100, 4), 0.6)
    rows = interleaved.rows_per_rank
    assert half.bubble == pytest.approx(1.5 * (half.compute + half.communication) / rows)
    # A slower network between the ranks of a group costs time.
    tensor = Run(tp=8, sequence_parallel=True)
    assert time_of(tensor, 8, per_node=4) > time_of(tensor, 8)


def test_groups_per_second_at_a_stated_mfu() -> None:
    """By hand: FLOPs of one group, at 40% of a chip's peak on 2 chips."""
    flops = step_flops(LLAMA3_8B, Run(), plan_rows(GROUPS, Run(), LLAMA3_8B.cost_model))
    a_group = flops.shared / len(GROUPS)
    assert groups_per_second(flops.shared, len(GROUPS), Machine(H100, 2), 0.4) == pytest.approx(
        0.4 * 2 * 989.4e12 / a_group
    )


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 1978.9e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H100 NVL", 835e12, 1671e12),
        ("NVIDIA H200", 989.4e12, 1978.9e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA A100-SXM4-40GB", 312e12, None),
        ("NVIDIA GH200 480GB", 989.4e12, 1978.9e12),
        ("NVIDIA B200", 2250e12, 4500e12),
    ],
)
def test_chips(name: str, bf16: float, fp8: float | None) -> None:
    gpu = find_gpu(name)
    assert gpu is not None
    assert (gpu.bf16, gpu.fp8) == (bf16, fp8)


def test_unknown_chips() -> None:
    assert find_gpu("NVIDIA GeForce RTX 3090") is None
    assert find_gpu("NVIDIA GB200") is None
    with pytest.raises(ConfigError, match="'T4' is not in the table; choose one of H100 PCIe"):
        known_gpu("T4")
    with pytest.raises(ConfigError, match="has no FP8"):
        known_gpu("A100").peak(fp8=True)
    assert Machine(H100, 16).bandwidth(16) == NETWORK
