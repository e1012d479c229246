"""Dithered masters by their bits: they round to the weights they came from, and fill the cells evenly."""

import math

import pytest
import torch

from mpo_megatron.training.masters import dither, uniform_numbers

ALL = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize(
    "uniform", [0.0, 1e-9, 1 / 3, 0.5 - 2**-53, 0.5, 2 / 3 - 2**-53, 2 / 3, 0.9, 1 - 2**-53]
)
def test_every_bf16_number_is_what_its_masters_round_to(uniform: float) -> None:
    """All exponents, both signs, zeros, denormals, powers of two, infinities and NaN."""
    masters = dither(ALL, torch.full(ALL.shape, uniform, dtype=torch.float64))
    assert masters.dtype == torch.float32
    assert torch.equal(
        masters.bfloat16().view(torch.int16)[~ALL.isnan()], ALL.view(torch.int16)[~ALL.isnan()]
    )
    assert masters[ALL.isnan()].isnan().all()
    changed = masters != ALL.float()
    plain = ALL.isnan() | ALL.isinf() | (ALL == 0)
    assert not changed[~ALL.isnan() & plain].any()
    if uniform not in (0.0, 1e-9, 0.5, 2 / 3):  # the middle of a cell
        assert changed[~plain].all()


@pytest.mark.parametrize("weight", [1.0, 1.5, -1.0, -0.0123, 2.0**-130])
def test_masters_fill_the_cell_evenly(weight: float) -> None:
    """In 20 equal parts of the cell of numbers that round to the weight; powers of two have a short side."""
    value = torch.tensor(weight).bfloat16()
    count = 200_000
    uniform = uniform_numbers(0, "cell", torch.arange(count))
    masters = dither(value.expand(count).contiguous(), uniform).double()
    magnitude = abs(float(value))
    upper = _next(value) / 2 + magnitude / 2
    lower = _next(value, -1) / 2 + magnitude / 2
    assert masters.sign().unique().tolist() == [math.copysign(1.0, weight)]
    found = torch.histc(masters.abs(), bins=20, min=lower, max=upper)
    assert found.sum() == count
    expected = count / 20
    assert float((found - expected).abs().max()) < 5 * math.sqrt(expected)


HALF = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("uniform", [0.0, 0.1, 0.5, 0.6, 1 - 2**-53])
def test_float16_numbers_stay_in_both_their_roundings(uniform: float) -> None:
    """All float16 numbers: a master rounds to the number it came from, and to the bf16 number that this rounds to."""
    values = HALF.float()
    masters = dither(values, torch.full(values.shape, uniform, dtype=torch.float64), 11)
    finite = values.isfinite()
    assert torch.equal(masters.half()[finite], HALF[finite])
    assert torch.equal(masters.bfloat16()[finite], values.bfloat16()[finite])
    assert torch.equal(masters[values == 0], values[values == 0])


def test_masters_of_float16_fill_the_bf16_cell_too() -> None:
    """Eight float16 numbers share a bf16 one; their masters together lie as evenly as bf16's own."""
    eighths = (1.5 + torch.arange(-4, 5) * 2.0**-10).half().float()
    eighths = eighths[eighths.bfloat16() == 1.5]
    weights = torch.full((len(eighths),), 2.0)
    weights[[0, -1]] = (
        1.0  # the two in the middle between bf16 numbers, of which this one has half a cell each
    )
    values = eighths.repeat_interleave(weights.long() * 20_000)
    masters = dither(values, uniform_numbers(0, "half", torch.arange(len(values))), 11)
    found = torch.histc(masters.double(), bins=16, min=1.5 - 2.0**-8, max=1.5 + 2.0**-8)
    expected = len(values) / 16
    assert float((found - expected).abs().max()) < 5 * math.sqrt(expected)


def test_float32_numbers_are_their_own_masters() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dither(values, torch.rand(1000, dtype=torch.float64), 24), values)


def _next(value: torch.Tensor, step: int = 1) -> float:
    """The magnitude of the next larger or smaller bf16 number."""
    return float((value.abs().view(torch.int16) + step).view(torch.bfloat16))


@pytest.mark.parametrize("hundredths", [1, 10, 50])
def test_a_small_update_moves_as_many_weights(hundredths: int) -> None:
    weights = (torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    units = torch.tensor([_unit(w) for w in weights[:1000]])
    weights = weights[:1000].repeat(400)
    masters = dither(weights, uniform_numbers(1, "update", torch.arange(len(weights))))
    moved = (masters + units.repeat(400) * hundredths / 100).bfloat16() != weights
    share = hundredths / 100
    # Powers of two have a smaller unit on one side; they are 1 in 128.
    assert float(moved.float().mean()) == pytest.approx(
        share, abs=4 * math.sqrt(share / len(weights)) + share / 100
    )


def _unit(weight: torch.Tensor) -> float:
    """The distance from a bf16 number to the next larger magnitude."""
    return _next(weight) - abs(float(weight))


def test_numbers_depend_on_seed_name_and_place_alone() -> None:
    places = torch.arange(100_000)
    numbers = uniform_numbers(3, "a", places)
    assert torch.equal(uniform_numbers(3, "a", places[500:600]), numbers[500:600])
    for seed, name in ((4, "a"), (3, "b")):
        other = uniform_numbers(seed, name, places)
        assert abs(float(torch.corrcoef(torch.stack((numbers, other)))[0, 1])) < 0.02
    assert 0 <= float(numbers.min()) < 1e-4
    assert 1 - 1e-4 < float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.005
    assert abs(float(torch.corrcoef(torch.stack((numbers[1:], numbers[:-1])))[0, 1])) < 0.02
