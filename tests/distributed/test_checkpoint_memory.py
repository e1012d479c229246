"""Checkpoints gather nothing: bytes that ranks need while they are written and read, counted on two and four ranks."""

from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.benchmarks.checkpoint import ON_ALL_RANKS, Found, measure

STATE, WEIGHTS = 12, 2  # bytes of a bf16 model's parameter
# Of what is made for a parameter at a time, of which this model has few, and of the other layout's part.
SOME = 1.5


def measured(ranks: Any, world: int, folder: Path, form: str) -> list[Found]:
    return [Found(**one) for one in ranks(world).run(measure, str(folder), form, 6, timeout=240)]


@pytest.mark.parametrize("world", [2, 4])
def test_buckets_are_written_and_read_by_each_rank_alone(world: int, ranks: Any, tmp_path: Path) -> None:
    for found in measured(ranks, world, tmp_path, "dp_reshardable"):
        # Copies of the weights that it writes, which lie in Megatron's buffer.
        assert found.saving <= 1.1 * WEIGHTS / world
        assert found.share == pytest.approx((STATE + WEIGHTS) / world, rel=0.03)
        # Matrices of the weights that are put together of two, and one parameter's state at a time.
        assert found.loading <= WEIGHTS + SOME
        assert found.reshaped <= WEIGHTS + SOME


@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_gathers_for_other_programs_and_no_rank_to_read(
    world: int, ranks: Any, tmp_path: Path
) -> None:
    first, *others = measured(ranks, world, tmp_path, "fully_reshardable")
    assert first.saving > STATE
    assert first.share == pytest.approx(STATE, rel=0.03)
    for found in others:
        assert found.saving <= 1.1 * STATE / world
    for found in (first, *others):
        assert found.loading <= WEIGHTS + SOME
        assert found.reshaped <= WEIGHTS + SOME


def test_the_count_sees_what_all_ranks_gather(ranks: Any, tmp_path: Path) -> None:
    for found in measured(ranks, 2, tmp_path, ON_ALL_RANKS):
        assert found.saving > STATE
        assert found.share == pytest.approx((STATE + WEIGHTS) / 2, rel=0.03)
