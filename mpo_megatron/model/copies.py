"""Copies that the backward pass makes again, in the place of keeping them.

An attention kernel keeps what it is given. Where that is a copy of something smaller, such as a prompt's keys once for
each of its responses, the smaller thing can be kept instead and the copy made again when the kernel's backward pass
asks for it: torch's hooks on saved tensors let that be done around a kernel whose insides are not ours.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Make = Callable[[], Tensor]
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Copies:
    """What may be made again, and the hooks that do it.

    Other tensors go to the hooks that were there before, such as those of torch.autograd.graph.save_on_cpu: torch asks
    only the innermost. So what one `Copies` keeps may be a copy to another one around it.
    """

    def __init__(self) -> None:
        # By address. The copies are held on to, so that no other tensor comes to have theirs.
        self._makers: dict[int, tuple[Tensor, Make]] = {}
        self._outer = _hooks_in_force()

    def keep(self, tensor: Tensor) -> Make:
        """Keep a tensor as autograd would; returns how to come by its values again."""
        return self._outer_keep(tensor.detach()) if torch.is_grad_enabled() else lambda: tensor

    def add(self, copy: Tensor, make: Make) -> Tensor:
        """`copy` itself; inside `not_kept` it is not kept, and `make` gives its values to the backward pass."""
        if torch.is_grad_enabled():
            self._makers[copy.data_ptr()] = copy, make
        return copy

    @contextlib.contextmanager
    def not_kept(self) -> Iterator[None]:
        """Operations within keep none of the copies."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            # torch may hold the hooks for as long as the graph.
            self._makers.clear()

    def _pack(self, tensor: Tensor) -> Make:
        copy, make = self._makers.get(tensor.data_ptr(), (None, None))
        if copy is not None and make is not None and _same_view(copy, tensor):
            return make
        # torch asks with gradients off.
        return self._outer_keep(tensor)

    def _outer_keep(self, tensor: Tensor) -> Make:
        pack, unpack = self._outer
        packed = pack(tensor)
        return lambda: unpack(packed)


def _unpack(make: Make) -> Tensor:
    with torch.no_grad():
        return make()


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _hooks_in_force() -> Hooks:
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks or (lambda tensor: tensor, lambda tensor: tensor)
