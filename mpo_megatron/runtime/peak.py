"""What a rank's processor can do at most, and the most memory that a process has held."""

import resource
import sys
import time

import torch
import torch.distributed as dist

_SIZE = 512
_SECONDS = 0.1


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a CPU rank in matrix products, all ranks at it at once: the mean over them. Every rank calls it."""
    # No random numbers: a run's own would be others after it.
    left = torch.ones(_SIZE, _SIZE, dtype=dtype)
    left @ left
    dist.barrier()
    best, began = float("inf"), time.perf_counter()
    # Also one product of a type that the processor is slow in is enough.
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    rate = torch.tensor(2 * _SIZE**3 / best, dtype=torch.float64)
    dist.all_reduce(rate)
    return float(rate) / dist.get_world_size()


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, of the whole process on a CPU. No wait for the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
