"""What autograd keeps while a step runs: bytes of distinct storages, at the most that there are at a time."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import Tensor


class _Held:
    """A saved tensor; autograd drops it when the backward pass has used it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Counts the storages that saved tensors have, each once however many of its views are saved."""

    def __init__(self, leave_out: Collection[Tensor]) -> None:
        self.leave_out = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
        self.users: Counter[int] = Counter()
        self.live = self.peak = 0

    def keep(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        held, key, size = _Held(tensor), storage.data_ptr(), storage.nbytes()
        if key not in self.leave_out and size:
            self.live += size if not self.users[key] else 0
            self.users[key] += 1
            self.peak = max(self.peak, self.live)
            weakref.finalize(held, self.drop, key, size)
        return held

    def drop(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.live -= size if not self.users[key] else 0


@contextlib.contextmanager
def saved_bytes(leave_out: Collection[Tensor]) -> Iterator[SavedBytes]:
    """Count what operations within the block save, tensors with the storages of `leave_out` left out."""
    counter = SavedBytes(leave_out)
    with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda held: held.tensor):
        yield counter
