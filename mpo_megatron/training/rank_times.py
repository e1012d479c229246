"""Which rank the others wait for.

Ranks that train together take the same time for a step, the fast ones by waiting. What tells them apart is the time
that a rank takes for the step's rows, forward and backward, until the sums over the replicas begin. Ranks that share a
model (tensor, context, pipeline parallel) wait for each other within that time: so it finds the replica, and the node
where a replica lies on one.

The times travel with the step's metrics, in the one sum and the one transfer that these need anyway. On a GPU a time is
known when the GPU has come so far; so each step brings those of the step before.
"""

import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from mpo_megatron.runtime.parallel import ParallelLayout


class RankTimes:
    """This rank's times with rows, and what all ranks' say. Every rank makes it.

    Args:
        chunks: whose gradients' sums end a time.
    """

    def __init__(self, chunks: Sequence[Any], layout: ParallelLayout) -> None:
        self._device = layout.device
        self._hosts: list[str] = [""] * layout.world_size
        dist.all_gather_object(self._hosts, socket.gethostname(), group=layout.control)
        self._begun: Any = None
        self._last: tuple[Any, Any] | None = None
        self._totals = [0.0] * layout.world_size
        self._steps = 0
        for config in {id(found): found for found in map(get_model_config, chunks)}.values():
            self._watch(config)

    def _watch(self, config: Any) -> None:
        """End the time where Megatron's schedule begins with the sums."""
        finalize = config.finalize_model_grads_func

        def timed(*args: Any, **kwargs: Any) -> None:
            self.end()
            finalize(*args, **kwargs)

        config.finalize_model_grads_func = timed

    def begin(self) -> float | None:
        """A step's rows begin to run. Returns the seconds of the step before, None before the first step.

        They are known without a wait: the metrics of that step, which came after, have arrived.
        """
        seconds = None if self._last is None else self._between(*self._last)
        self._begun = self._now()
        return seconds

    def end(self) -> None:
        """This rank is through with its rows."""
        self._last = (self._begun, self._now())

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1e3 if self._device.type == "cuda" else stop - start

    def add(self, seconds: Sequence[float]) -> dict[str, float]:
        """Take in the times of all ranks, of one step.

        Returns:
            `rank_seconds`, their median; `slowest_rank`; and `rank_spread`, by which part of the median that one takes
            longer.
        """
        self._totals = [total + one for total, one in zip(self._totals, seconds, strict=True)]
        self._steps += 1
        slowest, median = _slowest(seconds)
        return {
            "rank_seconds": median,
            "slowest_rank": slowest,
            "rank_spread": seconds[slowest] / median - 1,
        }

    def summary(self) -> str | None:
        """A line on all steps so far; None where there is one rank, or no step."""
        if len(self._totals) == 1 or not self._steps:
            return None
        slowest, median = _slowest(self._totals)
        return (
            f"ranks       rank {slowest} on {self._hosts[slowest]} was the slowest with its rows: "
            f"{self._totals[slowest] / self._steps:.3g} s a step, {self._totals[slowest] / median - 1:.1%} above the "
            "median"
        )


def _slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """(the rank with the longest time, the median)."""
    return max(range(len(seconds)), key=seconds.__getitem__), statistics.median(seconds)
