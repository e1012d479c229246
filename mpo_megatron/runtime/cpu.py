"""Megatron-core on CPU ranks: its real tensor, pipeline and data-parallel code, over Gloo.

Megatron-core asks for CUDA by name in places where any device would do: `torch.cuda.current_device()`,
`device="cuda"`, `tensor.cuda()`, streams, the CUDA generator's state, and a check of `tensor.type()`.
`install()` sends each of these to the CPU for this process. Nothing of Megatron's parallelism is replaced:
the collectives, schedules and optimizers that run are its own. What its experts ask of two collectives, and NCCL does
but Gloo does not, is done with what Gloo has.

Rules: `install()` is final for the process and refuses a process that has started CUDA. A GPU run never calls it.
Megatron-core looks all of these up when it calls them, so it may have been imported before.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: TorchFunctionMode | None = None


class _NullStream:
    """A CUDA stream where there is only one order of execution. A class, since libraries annotate with `Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "_NullStream":
        # All that is asked of an event is to synchronize.
        return self

    def __enter__(self) -> "_NullStream":
        return self

    def __exit__(self, *exc: object) -> None: ...


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` and pinned memory in torch calls, and names CPU tensors as Megatron's checks expect."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        elif func is torch.Tensor.type and len(args) == 1:
            # Megatron sorts gradients for their reduction by `tensor.type() == "torch.cuda.FloatTensor"`.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **(kwargs or {}))


def _all_to_all_single(
    exchange: Callable[..., Any],
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    **kwargs: Any,
) -> Any:
    """With sizes in tensors, too: Megatron makes numbers of them only where they come from a GPU."""
    sizes = (output_split_sizes, input_split_sizes)
    return exchange(output, input, *(s.tolist() if torch.is_tensor(s) else s for s in sizes), **kwargs)


def _all_gather(
    gather: Callable[..., Any],
    parts: list[torch.Tensor],
    own: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """With parts of different shapes, too, each of which its rank then sends to the others."""
    if len({part.shape for part in parts}) == 1:
        return gather(parts, own, group, async_op)
    assert not async_op, "parts of different shapes are gathered one after another"
    parts[dist.get_rank(group)].copy_(own)
    for rank, part in enumerate(parts):
        dist.broadcast(part, dist.get_process_group_ranks(group)[rank], group)
    return None


def _inside_the_mode(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    assert _installed is not None
    with _installed:
        return function(*args, **kwargs)


def is_installed() -> bool:
    """Whether this process sends CUDA requests to the CPU."""
    return _installed is not None


def install() -> None:
    """Make this process run Megatron-core on the CPU. Calling it again does nothing.

    Raises:
        RuntimeError: CUDA is already in use in this process.
    """
    global _installed
    if _installed is not None:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("mpo_megatron.runtime.cpu.install() after CUDA was started in this process")

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.current_stream = cuda.default_stream = _NullStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    collectives: Any = dist
    collectives.all_to_all_single = partial(_all_to_all_single, dist.all_to_all_single)
    collectives.all_gather = partial(_all_gather, dist.all_gather)

    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state

    # torch leaves a mode while it runs what the mode was asked about, and `backward` is asked about: without this, what
    # runs inside it, recomputed layers among it, would ask for CUDA.
    autograd: Any = torch.autograd
    autograd._engine_run_backward = partial(_inside_the_mode, autograd._engine_run_backward)

    _installed = _CudaMeansCpu()
    _installed.__enter__()
