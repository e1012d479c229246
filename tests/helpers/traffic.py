"""Payloads of the collectives and sends that a rank makes, by the group that they are among."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# By operation of torch's dispatcher, under all of the functions that call it: (call, whether its last tensors are what
# is sent; otherwise the larger side counts).
_CALLS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "broadcast_": "broadcast",
}
# What brings nothing that a rank sends: the other side of `send`, and waiting.
_QUIET = {"recv_", "barrier", "monitored_barrier_"}


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


class Traffic(TorchDispatchMode):
    """Context manager: `payload` by (group's name, call) of all calls within, each at least `smallest` bytes."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.payload: Counter[tuple[str, str]] = Counter()
        self.small = 0
        self.names = _names()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple) -> None:
        if operation in _QUIET:
            return
        call = _CALLS[operation]  # a call that is not known here must not go unseen
        groups = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
        (group,) = [dist.ProcessGroup.unbox(a) for a in groups]
        if group.size() == 1:
            return
        size = _size(args[1]) if call == "all-to-all" else max(_size(a) for a in args[:2])
        if size < self.smallest:
            self.small += size
            return
        # Between two interleaved stages one of the ways goes through the group of all ranks.
        name = "PP" if call == "send" else self.names.get(group.group_name, "other")
        self.payload[name, call] += size


def _names() -> dict[str, str]:
    """Megatron's groups by their names in torch, and the planner's names of them."""
    groups = {
        "DP": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "TP": parallel_state.get_tensor_model_parallel_group(),
        "PP": parallel_state.get_pipeline_model_parallel_group(),
        "CP": parallel_state.get_context_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
        "EP": parallel_state.get_expert_model_parallel_group(),
        "expert DP": parallel_state.get_expert_data_parallel_group(),
    }
    return {group.group_name: name for name, group in groups.items() if group is not None}
