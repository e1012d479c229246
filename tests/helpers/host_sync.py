"""What would have the host wait for a GPU, found on a CPU: an interceptor of torch's operations.

On a GPU an operation is only put into a queue, unless the host needs its values: to read a number, to know how large a
result is, or to copy from pageable memory. There torch.cuda.set_sync_debug_mode finds these; here they are known by
name, for what they do on a GPU:

    with watch() as found:
        ...
    assert found == []

Each `Wait` says what it was and whose line did it: the innermost one outside of torch, which is the caller of
backward() for what autograd's own nodes do.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NUMBER = (bool, int, float)
_TORCH = Path(torch.__file__).parent

# Reads a number, or looks at values to find the size of its result.
_OPERATIONS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip
# Indexing: by bool or uint8 it is a nonzero() first.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Brings values from the device to the host. On a CPU they reach no operation.
_TO_HOST = {"cpu", "numpy", "tolist", "__array__", "__dlpack__"}
# Written in torch as others that wait, out of sight of the operations.
_COMPOSED = {"allclose"}
# Makes a tensor of the host's values, which would have to be copied to the device from pageable memory.
_FROM_HOST = {"tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor", "from_numpy", "frombuffer"}


@dataclass(frozen=True)
class Wait:
    """One thing that waits: what, in which function, and its line ("mpo_megatron/training/step.py:241")."""

    what: str
    function: str
    line: str


def _wait(what: str) -> Wait:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside_torch = _TORCH in path.parents or frame.name == "__torch_function__"
        if path != Path(__file__) and not inside_torch:
            return Wait(what, frame.name, f"{'/'.join(path.parts[-3:])}:{frame.lineno}")
    raise AssertionError("no caller")


class _Operations(TorchDispatchMode):
    """What reaches torch's operations, in forward and backward."""

    def __init__(self, found: list[Wait]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _OPERATIONS:
            self._add(name)
        elif name in _INDEXING:
            if any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
                self._add(f"{name} by a mask")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._add("repeat_interleave without output_size")
        elif name == "segment_reduce" and not kwargs.get("unsafe"):
            self._add("segment_reduce that checks its lengths")
        return func(*args, **kwargs)

    def _add(self, what: str) -> None:
        self.found.append(_wait(what))


class _Functions(TorchFunctionMode):
    """What does not reach an operation on a CPU, or not under its own name."""

    def __init__(self, found: list[Wait]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        values = (*args[1:], *kwargs.values())
        if name in _TO_HOST | _FROM_HOST | _COMPOSED:
            self._add(name)
        elif name == "to" and any(str(value) == "cpu" for value in values):
            self._add("to the host")
        elif name == "where" and any(isinstance(value, _NUMBER) for value in values):
            self._add("where with a number, which is copied to the device")
        elif name == "__setitem__" and _tensors(args[1]) and isinstance(args[2], _NUMBER):
            self._add("a number put at an index, which is copied to the device")
        elif name == "tensor_split" and isinstance(args[1], Tensor):
            self._add(name)
        return func(*args, **kwargs)

    def _add(self, what: str) -> None:
        self.found.append(_wait(what))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def watch() -> Iterator[list[Wait]]:
    """Everything in the block that would wait on a GPU, in order, in this thread."""
    found: list[Wait] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(_wait(name))
            return original(*args, **kwargs)

        return call

    with (
        mock.patch.object(torch, "from_numpy", noted("from_numpy", torch.from_numpy)),
        _Operations(found),
        _Functions(found),
    ):
        yield found
