"""The matrix products of a step, and the time that the same ones take alone."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# Operations, and whether they add to what is there.
_PRODUCTS = {_ATEN.mm: False, _ATEN.bmm: False, _ATEN.addmm: True, _ATEN.addmm_: True, _ATEN.baddbmm: True}


@dataclass(frozen=True)
class Operand:
    """A matrix, or some of one shape, as it lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def make(self) -> Tensor:
        """Such a matrix, of ones."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).fill_(1)


@dataclass(frozen=True)
class Product:
    """left @ right, added to what is there or not."""

    left: Operand
    right: Operand
    adds: bool

    @property
    def flops(self) -> float:
        return 2.0 * math.prod(self.left.shape) * self.right.shape[-1]

    def seconds(self, repeats: int) -> float:
        """Processor seconds of it alone: the median of some."""
        left, right = self.left.make(), self.right.make()
        total = torch.zeros(*self.left.shape[:-1], self.right.shape[-1], dtype=self.left.dtype)
        multiply: Callable[[], Any]
        if self.adds and total.dim() == 2:
            multiply = lambda: total.addmm_(left, right)  # noqa: E731
        else:
            multiply = lambda: torch.matmul(left, right, out=total)  # noqa: E731
        multiply()
        found = []
        for _ in range(repeats):
            start = time.process_time()
            multiply()
            found.append(time.process_time() - start)
        return statistics.median(found)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        adds = _PRODUCTS.get(func.overloadpacket)
        if adds is not None:
            left, right = args[1:3] if adds else args[:2]
            self.found[Product(Operand.of(left), Operand.of(right), adds)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[Counter[Product]]:
    """The products that the block runs, forward and backward, and how often."""
    with _Recorder() as recorder:
        yield recorder.found


def flops(products: Counter[Product]) -> float:
    """Of all of them, as often as they are there."""
    return sum(product.flops * times for product, times in products.items())


def seconds_alone(products: Counter[Product], repeats: int = 3) -> float:
    """Processor seconds that all of them would take if each ran as fast as it does alone."""
    return sum(product.seconds(repeats) * times for product, times in products.items())
