"""How many significant bits a folder's weights have, whatever type they are stored in."""

from collections.abc import Iterable

import torch

from mpo_megatron.conversion.hf_folder import WeightReader

# Of the types that weights come in, the implicit leading one included.
BF16, FP16, FP32 = 8, 11, 24
_LOWER_BITS = {
    BF16: 0xFFFF,
    FP16: 0x1FFF,
}  # those of a float32 number that are zero in a number of so many bits


def significant_bits(reader: WeightReader, names: Iterable[str]) -> dict[str, int]:
    """BF16, FP16 or FP32 for each of these tensors.

    Many float32 folders were saved of bf16 weights and hold nothing beyond them. So of what is not stored as bf16 three
    rows are looked at (the first, the middle and the last; of a vector all of it), and the numbers decide.
    """
    return {name: _bits_of(reader, name) for name in names}


def _bits_of(reader: WeightReader, name: str) -> int:
    stored = reader.stored(name)
    if stored.dtype == "BF16":
        return BF16
    (source,) = reader.slices([name])
    rows = stored.shape[0]
    wanted = [slice(None)] if len(stored.shape) == 1 else [slice(i, i + 1) for i in (0, rows // 2, rows - 1)]
    sample = torch.cat([source[part].flatten() for part in wanted]).float().view(torch.int32)
    return next((bits for bits, lower in _LOWER_BITS.items() if not (sample & lower).any()), FP32)
