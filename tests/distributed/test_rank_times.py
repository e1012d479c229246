"""The rank that the others wait for is found, in the one reduction of the metrics; with clocks that the test sets."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from mpo_megatron.training import rank_times
from mpo_megatron.training.rank_times import RankTimes
from mpo_megatron.training.step import objective_pass
from tests.distributed.jobs import Layout, build, logps, objective_named, step_for
from tests.helpers.models import make_llama

SIZES = [2, 5, 3, 4, 2, 3]


class Clock:
    """Each reading is as many seconds after the one before as the rank's steps are to take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def perf_counter(self) -> float:
        self.now += self.seconds
        return self.now


def three_steps(folder: Path, wanted: Layout, max_tokens: int) -> tuple[list[dict[str, float]], Any, int]:
    """Metrics of three steps, the summary, and the all-reduces over all ranks in the last step.

    Rank r takes 2 + r seconds, rank 1 takes 8.
    """
    model = build(folder, SIZES, wanted)
    model.source.max_tokens = max_tokens
    reference = logps(model) - 1
    rows = step_for(model, "wmpo")
    rank = dist.get_rank()
    found, sums = [], 0
    all_reduce: Callable[..., Any] = dist.all_reduce

    def counted(tensor: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        nonlocal sums
        sums += group is None
        return all_reduce(tensor, *args, group=group, **kwargs)

    with mock.patch.object(rank_times, "time", Clock(8.0 if rank == 1 else 2.0 + rank)):
        times = RankTimes(model.chunks, model.layout)
        for number in range(3):
            for chunk in model.chunks:
                chunk.zero_grad_buffer()
            with mock.patch.object(dist, "all_reduce", counted if number == 2 else all_reduce):
                found.append(
                    objective_pass(
                        model.chunks, rows, objective_named("wmpo"), reference, model.layout, forward_only=False,
                        times=times,
                    )
                )  # fmt: skip
    return found, times.summary(), sums


@pytest.mark.parametrize(
    ("world", "layout", "max_tokens"),
    [(3, Layout(), 256), (3, Layout(), 40), (4, Layout(pp=2, vpp=2), 256), (4, Layout(tp=2), 256)],
    ids=["dp3", "dp3, split groups", "pp2-vpp2-dp2", "tp2-dp2"],
)
def test_the_slowest_rank_is_found(
    world: int, layout: Layout, max_tokens: int, ranks: Any, tmp_path: Path
) -> None:
    folder = make_llama(tmp_path)
    found = ranks(world).run(three_steps, folder, layout, max_tokens)
    times = sorted([2.0, 8.0, 4.0, 5.0][:world])
    median = (times[(world - 1) // 2] + times[world // 2]) / 2
    expected = {"rank_seconds": median, "slowest_rank": 1, "rank_spread": 8.0 / median - 1}
    for values, summary, sums in found:
        first, *later = values
        # Nothing is known in the first step; the others have the time of the one before.
        assert not expected.keys() & first.keys()
        for one in later:
            assert {name: one[name] for name in expected} == pytest.approx(expected)
            assert {name: one[name] for name in first} == first  # the same step, the same weights
        assert sums == 1
        assert summary.startswith(
            f"ranks       rank 1 on {socket.gethostname()} was the slowest with its rows: 8 s"
        )
        assert summary.endswith(f"{8.0 / median - 1:.1%} above the median")
    assert all(values == found[0][0] for values, *_ in found)


def one_rank(folder: Path) -> Any:
    model = build(folder, SIZES, Layout())
    times = RankTimes(model.chunks, model.layout)
    times.add([1.0])
    return times.summary()


def test_one_rank_waits_for_none(ranks: Any, tmp_path: Path) -> None:
    assert ranks(1).run(one_rank, make_llama(tmp_path)) == [None]
