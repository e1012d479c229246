"""Casts to 8-bit numbers as Transformer Engine's quantizers ask for them, with torch's own 8-bit types.

Scaling by tensor: current (the scale comes from the tensor) and delayed (the scale is given, the largest value noted).
Scaling by blocks is in `block_scaling`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.transformer_engine import block_scaling
from tests.helpers.transformer_engine.dtypes import FLOAT8, TORCH, DType

__all__ = ["bgrad_quantize", "create_empty_quantized_tensor", "dequantize", "fp8_transpose", "quantize"]


def plain(tensor: Any, by_columns: bool = False) -> Tensor:
    """The values of a tensor that may be an 8-bit one, those in float32; blocks run along rows or columns."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    if block_scaling.is_blockwise(tensor):
        return block_scaling.values(tensor, by_columns)
    kind = FLOAT8[DType(int(tensor._fp8_dtype))].dtype
    if tensor._data is not None:
        return tensor._data.view(kind).float() * tensor._scale_inv
    values = tensor._transpose.view(kind).float() * tensor._scale_inv
    return values.permute(*range(1, values.dim()), 0)


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """The tensor in 8 bits, by rows and, where the quantizer asks for it, transposed too."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if block_scaling.is_blockwise(quantizer):
        return block_scaling.quantize(tensor, quantizer, out)
    kind = FLOAT8[DType(int(quantizer.dtype))]
    values = tensor.detach().float()
    scale = _scale(values, quantizer, kind.largest)
    data = (values * scale).clamp(-kind.largest, kind.largest).to(kind.dtype).view(torch.uint8)
    transposed = fp8_transpose(data, None) if quantizer.columnwise_usage else None
    inverse = (1.0 / scale).reshape(1)
    if out is not None:
        if out._data is not None:
            out._data.copy_(data)
        # One that is not asked for now is of older values: the kernels' caller takes it away, too.
        out._transpose, out._transpose_invalid = transposed, transposed is None
        out._scale_inv.copy_(inverse)
        return out
    parts: dict[str, Any] = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": transposed,
        "fp8_scale_inv": inverse,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=tensor.dtype, **parts)
    return Float8Tensor(
        shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, device=tensor.device, **parts
    )


def _scale(values: Tensor, quantizer: Any, largest: float) -> Tensor:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    amax = values.abs().max() if values.numel() else values.new_zeros(())
    if not isinstance(quantizer, Float8CurrentScalingQuantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        return quantizer.scale.reshape(())
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = torch.where(amax > 0, largest / amax, torch.ones(()))
    return scale.log2().floor().exp2() if quantizer.force_pow_2_scales else scale


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """A tensor to be filled; making it is no collective."""
    reduces = getattr(quantizer, "with_amax_reduction", False)
    if reduces:
        quantizer.with_amax_reduction = False
    made = quantize(torch.zeros(shape, dtype=dtype), quantizer)
    if reduces:
        quantizer.with_amax_reduction = True
    return made


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """The last dimension first."""
    transposed = data.permute(-1, *range(data.dim() - 1)).contiguous()
    return transposed if out is None else out.copy_(transposed)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    return plain(tensor).to(TORCH[DType(int(dtype))])


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """(gradient of a bias, the gradient in 8 bits)."""
    return gradient.flatten(0, -2).sum(0), quantize(gradient, quantizer)
