"""Time as processor time of this process, or as what passes while a GPU works, and memory as bytes that are counted."""

import argparse
import gc
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


def add_accelerator(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks that run on a GPU too."""
    parser.add_argument(
        "--accelerator",
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="auto: the GPU where there is one",
    )


def clock(device: torch.device) -> str:
    """What `compare` counts, for people."""
    return "s on the GPU" if device.type == "cuda" else "processor s"


def measured_on(device: torch.device) -> str:
    """The device, for the settings of a report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _now(device: torch.device) -> float:
    """Seconds: of all threads of this process, or, when the GPU has done all it was given, of the day."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def compare(
    sides: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 1, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of each call of each side (see `clock`).

    The sides take turns, so that a change of the machine's speed meets them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(warm_up + repeats):
        for name, call in sides.items():
            gc.collect()
            start = _now(device)
            call()
            if repeat >= warm_up:
                seconds[name].append(_now(device) - start)
    return seconds


def saved_bytes(forward: Callable[[], Any], leave_out: Collection[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of `forward()`.

    Args:
        leave_out: tensors whose storages are there anyway.
    """
    inputs = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from when they are made until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._seen(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._made(tensor.untyped_storage())
        return result

    def _seen(self, storage: torch.UntypedStorage) -> None:
        """One from before; a new one may come to its address when it is freed."""
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self.known.discard, key)

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self.known.discard(key)


def peak_bytes(call: Callable[[], Any], device: torch.device = CPU) -> int:
    """Most bytes that tensors made inside `call()` hold at a time.

    On a CPU what lies within one operation is not seen; of a GPU torch's allocator counts all.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as storages:
        result = call()
    del result
    return storages.peak
