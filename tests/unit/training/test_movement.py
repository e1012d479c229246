"""Which bf16 weights an update moves, against rounding itself."""

import pytest
import torch

from mpo_megatron.training.movement import shows


@pytest.mark.parametrize("update", [5e-7, 4e-6, 4e-5, 1e-3])
def test_an_update_shows_where_rounding_keeps_it(update: float) -> None:
    weights = (torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    moved = weights.float() + weights.float().sign() * update
    found = shows(weights, update)
    changed = moved.bfloat16() != weights
    # In the middle, rounding goes to the even number, which is one of the two.
    distance = (weights.view(torch.int16) + 1).view(torch.bfloat16).float() - weights.float()
    away = (distance.abs() / 2 - update).abs() > 1e-9
    assert torch.equal(found[away], changed[away])
    assert 0 < float(found.float().mean()) <= 1


def test_next_to_a_power_of_two() -> None:
    one = torch.tensor([1.0, -1.0, 0.0]).bfloat16()
    assert shows(one, 2.0**-8).tolist() == [True, True, True]
    assert shows(one, 0.99 * 2.0**-8).tolist() == [False, False, True]
