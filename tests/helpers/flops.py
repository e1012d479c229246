"""FLOPs of the matrix products that run, by torch's counter; attention by its own mask, call by call."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_OPERATIONS = torch.ops.aten
_FORWARD = _OPERATIONS._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = _OPERATIONS._scaled_dot_product_flash_attention_for_cpu_backward


def _pairs(query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Of q queries at the end of k keys, each sees itself and what is before."""
    return sum(key[2] - query[2] + 1 + i for i in range(query[2]))


def _forward(query: tuple[int, ...], key: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Scores and output: two products over the pairs for each query head."""
    return 2 * 2 * query[1] * query[3] * _pairs(query, key)


def _backward(grad: Any, query: tuple[int, ...], key: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Scores again, and the gradients of weights, values, queries and keys: five products."""
    return 5 * 2 * query[1] * query[3] * _pairs(query, key)


def _added(total: Any, left: tuple[int, ...], right: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """A product that is added in place, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


class CountedFlops:
    """Context manager: `total` FLOPs of what ran within, `attention` of them in attention."""

    def __init__(self) -> None:
        known = {_FORWARD: _forward, _BACKWARD: _backward, _OPERATIONS.addmm_: _added}
        self._mode = FlopCounterMode(display=False, custom_mapping=known)

    def __enter__(self) -> "CountedFlops":
        self._mode.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._mode.__exit__(*exc)

    @property
    def total(self) -> int:
        return self._mode.get_total_flops()

    @property
    def attention(self) -> int:
        counts = self._mode.get_flop_counts()["Global"]
        return sum(counts.get(operation, 0) for operation in (_FORWARD, _BACKWARD))
