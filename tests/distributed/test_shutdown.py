"""The end of the process groups: nobody leaves while others may still be in the last collective."""

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def leave(seconds: float) -> tuple[float, float]:
    """(when this rank came to the end, when it was through), the last rank so many seconds later."""
    from mpo_megatron.runtime import parallel

    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(seconds)
    came = time.monotonic()
    parallel.shutdown()
    assert not dist.is_initialized()
    return came, time.monotonic()


def test_the_first_waits_for_the_last(ranks: Any) -> None:
    times = ranks(3).run(leave, 1.0)
    assert min(left for _, left in times) >= max(came for came, _ in times)


def leave_alone(seconds: float) -> None:
    """All but the last rank come to the end."""
    from mpo_megatron.runtime import parallel

    if dist.get_rank() == dist.get_world_size() - 1:
        return
    usual, parallel._LATEST_TO_LEAVE = parallel._LATEST_TO_LEAVE, timedelta(seconds=seconds)
    try:
        parallel.shutdown()
    finally:
        parallel._LATEST_TO_LEAVE = usual


def test_nobody_waits_for_ever(ranks: Any) -> None:
    ranks(3).run(leave_alone, 1.0, timeout=15)
