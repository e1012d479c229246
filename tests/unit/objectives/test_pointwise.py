"""KTO, SPPO, offline GRPO and SFT against numbers worked out by hand."""

import math

import pytest
import torch

from tests.helpers.objectives import F64, batch_of, loss_and_gradient, run

LN2, LN3 = math.log(2), math.log(3)


def test_kto_by_hand() -> None:
    # Mean of r: (2 log 3 + 0 + 0 + 2 log 3) / 4 = log 3, so that beta (r - z0) = +-log 3.
    batch = batch_of([[1.0, 0.0], [1.0, 0.0]], [[2 * LN3, 0.0], [0.0, 2 * LN3]])
    losses, gradient = loss_and_gradient("kto", batch, beta=1.0, desirable_weight=1.0, undesirable_weight=3.0)
    assert losses == pytest.approx([(1 / 4 + 3 / 4) / 2, (3 / 4 + 9 / 4) / 2])
    # sigma (1 - sigma) = 3/16 everywhere; the reference point passes no gradient on.
    wanted = torch.tensor([-1.0, 3.0, -1.0, 3.0], dtype=F64) * 3 / 16 / 2
    torch.testing.assert_close(gradient, wanted)


def test_the_reference_point_of_kto_is_not_negative() -> None:
    batch = batch_of([[1.0, 0.0], [1.0, 0.0]], [[-LN3, -LN3], [0.0, -9.0]])
    (first, _) = run("kto", batch, beta=1.0).losses.tolist()
    assert first == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_sppo_by_hand() -> None:
    # Scores log 3, 0, 0: rates (3/4, 3/8, 3/8); beta 1/2: targets 1/2, -1/4, -1/4.
    batch = batch_of([[LN3, 0.0, 0.0]], [[0.0, 0.0, 1.0]])
    losses, gradient = loss_and_gradient("sppo", batch, beta=0.5)
    assert losses == pytest.approx([1 / 4 + 1 / 16 + 25 / 16])
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.5, 2.5], dtype=F64))


def test_grpo_by_hand() -> None:
    # Scores 3, 0, 0: deviations 2, -1, -1 over sqrt(2). Untrained: the advantages sum to 0, gradient -A_i.
    batch = batch_of([[3.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]])
    losses, gradient = loss_and_gradient("grpo_offline", batch, clip=0.2)
    assert losses == pytest.approx([0.0], abs=1e-15)
    torch.testing.assert_close(gradient, -torch.tensor([2.0, -1.0, -1.0], dtype=F64) / math.sqrt(2))


@pytest.mark.parametrize(
    ("good", "bad", "loss", "slopes"),
    [
        (1.1, 1.0, -1.1 + 1.0, [-1.1, 1.0]),
        (1.5, 1.0, -1.2 + 1.0, [0.0, 1.0]),  # good enough
        (0.5, 1.0, -0.5 + 1.0, [-0.5, 1.0]),
        (1.0, 0.5, -1.0 + 0.8, [-1.0, 0.0]),  # bad enough
        (1.0, 1.5, -1.0 + 1.5, [-1.0, 1.5]),
        (1.0, 5.0, -1.0 + 3.0, [-1.0, 0.0]),  # beyond the bound
    ],
)
def test_the_clip_of_grpo(good: float, bad: float, loss: float, slopes: list[float]) -> None:
    batch = batch_of([[1.0, 0.0]], [[math.log(good), math.log(bad)]])  # advantages 1 and -1
    losses, gradient = loss_and_gradient("grpo_offline", batch, clip=0.2, dual_clip=3.0)
    assert losses == pytest.approx([loss])
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=F64))


def test_grpo_per_token() -> None:
    batch = batch_of([[1.0, 0.0]], [[2 * math.log(1.1), 0.0]], lengths=[[2, 4]])
    losses, gradient = loss_and_gradient("grpo_offline", batch, length_normalised=True)
    assert losses == pytest.approx([-0.1])
    torch.testing.assert_close(gradient, torch.tensor([-1.1 / 2, 1 / 4], dtype=F64))


def test_sft_by_hand() -> None:
    batch = batch_of([[1.0, 4.0, 4.0]], [[-1.0, -6.0, -5.0]], lengths=[[2, 3, 4]])
    losses, gradient = loss_and_gradient("sft", batch)
    assert losses == [2.0]
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1 / 3, 0.0], dtype=F64))
