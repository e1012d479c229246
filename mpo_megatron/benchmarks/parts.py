"""Where the time of a training step goes, from torch's profiler on one CPU thread.

An operation's own time belongs to the innermost of the ranges around it: those that `Job`, its rows and Megatron's
timers name, and those that are put here around every attention and the response head. What autograd runs belongs to
where its forward operation ran: both have one sequence number. Time in a range or in autograd's engine and in no
operation is Python's.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron.core.utils import get_model_config
from torch.profiler import ProfilerActivity, profile, record_function

from mpo_megatron.benchmarks.job import Job
from mpo_megatron.model.attention import SharedPromptAttention
from mpo_megatron.model.head import ResponseHead
from mpo_megatron.training.profiling import RangeTimers

ATTENTION, HEAD, PYTHON = "attention", "head", "Python"
# From a range's name to the part; Megatron's timers have names of their own.
_RANGES = {
    ATTENTION: ATTENTION,
    HEAD: HEAD,
    "forward-compute": "forward",
    "backward-compute": "backward",
    "optimizer": "optimizer",
    "all-grads-sync": "all-reduce",
    "embedding-grads-all-reduce": "all-reduce",
    "plan": "packing",
    "read and pack": "packing",
}
PARTS = ("forward", "backward", ATTENTION, HEAD, "optimizer", "all-reduce", "packing", PYTHON)
_NODE = "autograd::engine::evaluate_function: "
# Names of operations in the profile, as people call them.
_KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "attention kernels": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "copies": ("copy_", "cat", "clone", "index", "index_select", "gather"),
    "multiplications": ("mul", "mul_", "div", "div_", "addcmul", "addcmul_"),
    "additions": ("add", "add_", "sub", "sub_", "index_add_", "index_add"),
    "fills": ("fill_", "zero_"),
    "sums and norms": ("sum", "mean", "pow", "rsqrt", "linalg_vector_norm", "amax"),
    "activations": ("silu", "silu_backward", "sigmoid", "exp_", "exp", "log_"),
    "Adam": ("_fused_adam_", "_fused_adamw_"),
}


@dataclass
class Parts:
    """Seconds under the profiler, which makes a step of many small operations some percent longer.

    Attributes:
        seconds: by part.
        products: the same, of matrix products alone; attention kernels are none of them.
        kinds: by kind of operation.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


def time_parts(job: Job, call: Callable[[], Any]) -> Parts:
    """The parts of a call that trains on this rank, on one thread."""
    with _named(job), profile(activities=[ProfilerActivity.CPU]) as found, record_function("step"):
        call()
    return parts_of(found.events())


@contextmanager
def _named(job: Job) -> Iterator[None]:
    """Ranges around attention, head, optimizer and rows, and Megatron's own."""
    open_ranges: list[Any] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*args: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    timers = RangeTimers(record_function)
    configs = [get_model_config(chunk) for chunk in job.chunks]
    for chunk in job.chunks:
        for module in chunk.modules():
            for kind, name in ((SharedPromptAttention, ATTENTION), (ResponseHead, HEAD)):
                if isinstance(module, kind):
                    handles.append(module.register_forward_pre_hook(enter(name)))
                    handles.append(module.register_forward_hook(leave))
    before = job.mark
    job.mark = record_function
    for config in configs:
        config.timers = timers
    try:
        yield
    finally:
        job.mark = before
        for config in configs:
            config.timers = None
        for handle in handles:
            handle.remove()


def parts_of(events: Any) -> Parts:
    """The parts of a profile's events, each of which knows the one around it."""
    events = list(events)
    forward = _forward_parts(events)
    found = Parts()
    for event in events:
        seconds = event.self_cpu_time_total / 1e6
        name = event.name.removeprefix("aten::")
        is_operation = name != event.name or event.name.startswith(("c10d::", "gloo:"))
        part = _part(event, forward)
        # Who waits for other ranks runs no operation.
        if not is_operation and part != "all-reduce":
            part = PYTHON
        found.seconds[part] += seconds
        kind = (
            next((kind for kind, names in _KINDS.items() if name in names), None) if is_operation else PYTHON
        )
        found.kinds[kind or "other operations"] += seconds
        if kind == "matrix products":
            found.products[part] += seconds
    return found


def _forward_parts(events: list[Any]) -> dict[int, str]:
    """The parts of forward operations that have some of their own, by sequence number.

    Operations that record nothing have the number of the next that does: the last one with a number is its owner.
    """
    owners: dict[int, Any] = {}
    for event in events:
        if event.sequence_nr < 0 or _is_backward(event):
            continue
        known = owners.get(event.sequence_nr)
        if known is None or event.time_range.start > known.time_range.start:
            owners[event.sequence_nr] = event
    parts = {number: _part(event, {}) for number, event in owners.items()}
    return {number: part for number, part in parts.items() if part in (ATTENTION, HEAD)}


def _is_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(_NODE):
            return True
        event = event.cpu_parent
    return False


def _part(event: Any, forward: dict[int, str]) -> str:
    """The part of an operation, from the ranges around it, the innermost first."""
    while event is not None:
        if event.name.startswith(("c10d::", "gloo:")):
            return "all-reduce"
        if event.sequence_nr in forward and _is_backward(event):
            return forward[event.sequence_nr]
        if event.name in _RANGES:
            return _RANGES[event.name]
        event = event.cpu_parent
    return PYTHON
