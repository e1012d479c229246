"""Casts to 8 bits with a scale for each 128 x 128 tile, or for 128 numbers in a row, as Float8BlockQuantizer asks.

Blocks run along the dimension that a product sums over, so the cast by rows and the cast by columns are of different
blocks and differ in value, unless the blocks are tiles. The layout of scales is what Transformer Engine's own
`dequantize` reads; a test holds the two together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.transformer_engine.dtypes import FLOAT8, DType

BLOCK = 128


def is_blockwise(quantizer_or_tensor: Any) -> bool:
    """Whether this is Transformer Engine's quantizer of blocks, or a tensor that one has cast."""
    return hasattr(quantizer_or_tensor, "block_scaling_dim") or hasattr(quantizer_or_tensor, "_is_2D_scaled")


def quantize(tensor: Tensor, quantizer: Any, out: Any) -> Any:
    """The tensor [..., K] in 8 bits: by rows, by columns (and then with K first), or both."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )

    values = tensor.detach().float().flatten(0, -2)
    tiles = quantizer.block_scaling_dim == 2
    parts: dict[str, Tensor | None] = dict.fromkeys(
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    )
    if quantizer.rowwise_usage:
        data, inverse = _cast(values, quantizer, tiles)
        parts |= {"rowwise_data": data.view(tensor.shape), "rowwise_scale_inv": inverse}
    if quantizer.columnwise_usage:
        data, inverse = _cast(values.t(), quantizer, tiles)
        parts |= {
            "columnwise_data": data.view(tensor.shape[-1], *tensor.shape[:-1]),
            "columnwise_scale_inv": inverse,
        }
    if out is not None:
        # What is not asked for now is of older values: the kernels' caller takes it away, too.
        for name, part in parts.items():
            setattr(out, f"_{name}", part)
        return out
    common: dict[str, Any] = {
        **parts, "fp8_dtype": quantizer.dtype, "quantizer": quantizer, "is_2D_scaled": tiles,
    }  # fmt: skip
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(fake_dtype=tensor.dtype, **common)
    return Float8BlockwiseQTensor(
        shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, device=tensor.device, **common
    )


def values(tensor: Any, by_columns: bool) -> Tensor:
    """What the cast tensor [..., K] is, in float32: the cast that a product takes which sums over rows, or columns.

    Raises:
        AssertionError: the tensor has not been cast that way.
    """
    side = "columnwise" if by_columns else "rowwise"
    data, inverse = getattr(tensor, f"_{side}_data"), getattr(tensor, f"_{side}_scale_inv")
    assert data is not None, f"a product of {side} blocks, and the tensor was not cast so"
    # By columns the data is the transposed matrix's: its rows are this one's columns.
    lines = data.flatten(1) if by_columns else data.flatten(0, -2)
    rows, columns = lines.shape
    if tensor._is_2D_scaled:
        factors = inverse.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    else:
        factors = inverse[:, :rows].t().repeat_interleave(BLOCK, 1)[:, :columns]
    found = lines.view(FLOAT8[DType(int(tensor._fp8_dtype))].dtype).float() * factors
    if by_columns:
        return found.t().reshape(*data.shape[1:], data.shape[0])
    return found.view(data.shape)


def _cast(matrix: Tensor, quantizer: Any, tiles: bool) -> tuple[Tensor, Tensor]:
    """(data [M, K] in 8 bits, reciprocal scales), blocks along K.

    Scales of tiles are [M / 128, K / 128], of lines [K / 128, M]; the last dimension is filled up to a multiple of 4.
    """
    kind = FLOAT8[DType(int(quantizer.dtype))]
    rows, columns = matrix.shape
    height = BLOCK if tiles else 1
    padded = F.pad(matrix, (0, -columns % BLOCK, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // BLOCK, BLOCK)
    scale = _scale(blocks.abs().amax((1, 3)), quantizer, kind.largest)
    cast = (blocks * scale[:, None, :, None]).clamp(-kind.largest, kind.largest).to(kind.dtype)
    data = cast.view(padded.shape)[:rows, :columns].contiguous().view(torch.uint8)
    inverse = 1.0 / (scale if tiles else scale.t())
    return data, F.pad(inverse, (0, -inverse.shape[1] % 4))


def _scale(amax: Tensor, quantizer: Any, largest: float) -> Tensor:
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = torch.where(amax > 0, largest / amax, torch.ones(()))
    return scale.log2().floor().exp2() if quantizer.force_pow_2_scales else scale
