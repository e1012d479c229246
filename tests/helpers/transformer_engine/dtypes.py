"""The types of tensors as Transformer Engine numbers them."""

import enum
from dataclasses import dataclass

import torch


class DType(enum.IntEnum):
    """`transformer_engine_torch.DType`."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


@dataclass(frozen=True)
class Float8:
    """An 8-bit type: torch's name and its largest number."""

    dtype: torch.dtype
    largest: float


FLOAT8 = {
    DType.kFloat8E4M3: Float8(torch.float8_e4m3fn, 448.0),
    DType.kFloat8E5M2: Float8(torch.float8_e5m2, 57344.0),
}
