"""SplitMix64 by its published numbers."""

import torch

from mpo_megatron.objectives.splitmix import shift_right, splitmix64


def test_the_first_outputs_of_the_generator_seeded_with_zero() -> None:
    """Its state is a multiple of the golden ratio; the numbers are those of the xoshiro authors' code."""
    unsigned = [value % 2**64 for value in splitmix64(torch.tensor([1, 2, 3])).tolist()]
    assert unsigned == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_zeros_come_in() -> None:
    assert shift_right(torch.tensor([-1]), 60).tolist() == [15]
