"""SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators), as a function of a counter.

A number depends on its counter alone: not on how many were drawn before, nor on which rank.
"""

from torch import Tensor


def _signed(constant: int) -> int:
    """A 64-bit constant as the int64 of the same bits; products of int64 wrap around as those of unsigned ones do."""
    return constant - (1 << 64)


def shift_right(bits: Tensor, places: int) -> Tensor:
    """Zeros come in."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def splitmix64(counters: Tensor, key: int = 0) -> Tensor:
    """64 bits that look random, as int64, of each int64 counter; another `key` gives another sequence."""
    bits = counters * _signed(0x9E3779B97F4A7C15) + key
    bits = (bits ^ shift_right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ shift_right(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ shift_right(bits, 31)
