"""What Transformer Engine asks of the device beyond what Megatron asks, answered as a Hopper GPU would."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

_CAPABILITY = (9, 0)


class _Event:
    """A CUDA event where there is one order of execution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextmanager
def _coalescing(
    coalescing: Callable[..., Any], group: Any = None, device: Any = None, async_ops: bool = False
) -> Iterator[Any]:
    """Collectives that are sent together. With a device a backend has calls of its own for that, which Gloo has not:
    they are done one by one, each when it has returned.
    """
    if device is None:
        with coalescing(group, None, async_ops) as handles:
            yield handles
    else:
        yield SimpleNamespace(wait=lambda: None)


def answer_for_the_gpu() -> None:
    """To be called once, after `mpo_megatron.runtime.cpu.install`."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.is_bf16_supported = lambda *args: True
    cuda.get_device_capability = lambda *args: _CAPABILITY
    cuda.get_device_properties = lambda *args: SimpleNamespace(
        major=_CAPABILITY[0], minor=_CAPABILITY[1], multi_processor_count=1, total_memory=2**34, name="cpu"
    )
    cuda.Event = _Event
    # The first version whose products take a scale for each block.
    torch.version.cuda = "12.9"
    dist._coalescing_manager = partial(_coalescing, dist._coalescing_manager)
    # It asserts of all tensors that they are there.
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]

    gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.get_cublas_workspace = lambda *args: torch.empty(1, dtype=torch.uint8)
    # Where weight gradients go to main_grad, autograd gets a tensor in their place, on the GPU by name.
    for name in ("base", "linear", "layernorm_linear", "layernorm_mlp", "grouped_linear"):
        module: Any = importlib.import_module(f"transformer_engine.pytorch.module.{name}")
        if hasattr(module, "get_dummy_wgrad"):
            module.get_dummy_wgrad = lambda shape, dtype, zero=False: torch.zeros(shape, dtype=dtype)
