"""Triton's interpreter: kernels run in NumPy, without a GPU, from the source that a GPU's are compiled from."""

import importlib.util
import os
from typing import Any

import numpy as np


def is_there() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def set_up() -> None:
    """Have a rank interpret kernels. Triton must not have been imported: it looks once."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _mend_bf16(interpreter.InterpreterBuilder)
    from tests.distributed import rank_setup

    rank_setup.set_up()


def _mend_bf16(builder: Any) -> None:
    """The interpreter has bf16 as integers of 16 bits: its product multiplies these, and it rounds towards zero, which
    no GPU does (Triton 3.2 to 3.9).
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    multiply, cast = builder.create_dot, builder.cast_impl

    def as_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return multiply(self, as_float32(left), as_float32(right), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        # To the nearest, of two the even one.
        bits = source.data.view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), nearest), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
