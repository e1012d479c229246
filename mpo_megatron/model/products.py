"""Products of bf16 matrices whose sums are not rounded to bf16 again.

The sums of such a product are float32 inside the processor. Written as bf16 they keep 8 bits: logits between 16 and 32
are off by up to 0.06.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# torch >= 2.8, on a GPU.
_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")
# Columns that are in float32 at a time elsewhere.
_BLOCK = 1024


def full_product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] @ right [k, m] of one type, in float32; in float64 where they are.

    A GPU writes its sums as they are. Elsewhere the factors are made float32, the right one in blocks of columns; a CPU
    that has instructions for bf16 is told to use them all the same, which loses nothing of numbers that were bf16.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == dtype:
        return left @ right
    if left.device.type == "cuda" and _OUT_DTYPE:
        return torch.mm(left, right, out_dtype=dtype)
    product = left.new_empty((left.size(0), right.size(1)), dtype=dtype)
    whole = left.to(dtype)
    with _bf16_instructions() if left.dtype == torch.bfloat16 else contextlib.nullcontext():
        for part, block in zip(product.split(_BLOCK, 1), right.split(_BLOCK, 1), strict=True):
            torch.mm(whole, block.to(dtype), out=part)
    return product


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [n, m] += left [n, k] @ right [k, m], added in the type of `total`: that of the factors, or float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda" and _OUT_DTYPE:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += full_product(left, right)


@contextlib.contextmanager
def _bf16_instructions() -> Iterator[None]:
    """Have a CPU multiply float32 matrices as bf16 ones and add in float32, where torch (>= 2.9) can be told so."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
