"""Rankings, bins and distributions against numbers worked out by hand and the limits in which they are one another."""

import math

import pytest
import torch

from mpo_megatron.objectives.listwise import cut_bins
from tests.helpers.objectives import F64, batch_of, loss_and_gradient, random_batch, run

LN2, LN3 = math.log(2), math.log(3)


def close(found: list[float], *wanted: float) -> None:
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-13)


def test_plackett_luce_by_hand() -> None:
    # Utilities 3, 2, 1: picked in this order with 3/6 * 2/3 * 1/1, in the other with 1/6 * 2/5 * 3/3.
    utilities = [LN3, LN2, 0.0]
    batch = batch_of([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [utilities, utilities])
    losses, gradient = loss_and_gradient("plackett_luce", batch, beta=1.0)
    close(losses, math.log(3), math.log(15))
    # Of the first group: sum of the softmaxes that a response is in, minus 1 for each it has won.
    wanted = [3 / 6 - 1, 2 / 6 + 2 / 3 - 1, 1 / 6 + 1 / 3 + 1 - 1]
    torch.testing.assert_close(gradient[:3], torch.tensor(wanted, dtype=F64))


def test_plackett_luce_keeps_the_order_of_equal_scores() -> None:
    tied = batch_of([[5.0, 5.0, 1.0, 5.0]], [[LN3, LN2, 0.0, 1.0]])
    apart = batch_of([[7.0, 6.0, 1.0, 5.0]], [[LN3, LN2, 0.0, 1.0]])
    close(
        run("plackett_luce", tied, beta=1.0).losses.tolist(),
        *run("plackett_luce", apart, beta=1.0).losses.tolist(),
    )


def test_three_bins_by_hand() -> None:
    # Mean 4.25 parts {10, 6} from {1, 0}; the upper two differ more. Utilities 4, 3, 2, 1: 4/10 * 3/6.
    batch = batch_of([[10.0, 6.0, 1.0, 0.0]], [[math.log(4), LN3, LN2, 0.0]])
    assert cut_bins(batch, 3).tolist() == [0, 1, 2, 2]
    close(run("ordered_bins", batch, beta=1.0, k=3).losses.tolist(), math.log(5))
    close(run("ordered_bins", batch, beta=1.0, k=2).losses.tolist(), math.log(10 / 7))


def test_bins_of_equal_scores_stay_whole() -> None:
    batch = batch_of([[4.0, 4.0, 1.0, 1.0, 0.0], [0.3, 0.3, 0.1, 0.1]], [[0.0] * 5, [0.0] * 4])
    assert cut_bins(batch, 9).tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 1]


def test_two_bins_are_mpo() -> None:
    batch = random_batch()
    losses, gradient = loss_and_gradient("ordered_bins", batch, beta=0.3, k=2)
    wanted, wanted_gradient = loss_and_gradient("mpo", batch, beta=0.3)
    assert losses == pytest.approx(wanted, rel=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-14)


def test_as_many_bins_as_responses_are_plackett_luce() -> None:
    batch = random_batch()
    losses, gradient = loss_and_gradient("ordered_bins", batch, beta=0.3, k=8)
    wanted, wanted_gradient = loss_and_gradient("plackett_luce", batch, beta=0.3)
    assert losses == pytest.approx(wanted, rel=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-14)
    between = run("ordered_bins", batch, beta=0.3, k=4).losses
    assert ((between - torch.tensor(wanted, dtype=F64))[[1, 3]].abs() > 1e-3).all()


def test_infonca_by_hand() -> None:
    # Target (3/4, 1/4), untrained: loss log 2, gradient softmax(z) - p (Lemma 5).
    batch = batch_of([[2 * LN3, 0.0]], [[0.0, 0.0]])
    losses, gradient = loss_and_gradient("infonca", batch, beta=1.0, alpha=2.0)
    close(losses, LN2)
    torch.testing.assert_close(gradient, torch.tensor([-0.25, 0.25], dtype=F64))


def test_infonca_of_two_with_a_cold_target_is_dpo() -> None:
    batch = batch_of([[1.0, 0.0], [0.0, 1.0]], [[0.7, -0.4], [0.7, -0.4]])
    losses, gradient = loss_and_gradient("infonca", batch, beta=0.3, alpha=1e-3)
    wanted, wanted_gradient = loss_and_gradient("dpo", batch, beta=0.3)
    assert losses == pytest.approx(wanted, rel=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient)


def test_nca_by_hand() -> None:
    # Target (3/4, 1/4), untrained: (p_i + 1/2) log 2 each, gradient -p_i / 2 + 1 / 4.
    losses, gradient = loss_and_gradient("nca", batch_of([[LN3, 0.0]], [[0.0, 0.0]]), beta=1.0, alpha=1.0)
    close(losses, 2 * LN2)
    torch.testing.assert_close(gradient, torch.tensor([-1 / 8, 1 / 8], dtype=F64))


@pytest.mark.parametrize(
    ("distance", "wanted"),
    [
        ("bwd_kl", 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)),
        ("fwd_kl", 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)),
        ("squared", LN3**2),
    ],
)
def test_rpo_by_hand(distance: str, wanted: float) -> None:
    """Two responses, for which these are NeMo-Aligner's formulas: Bernoulli 3/4 against 1/2, and the gap of scores."""
    batch = batch_of([[1.0, 0.0]], [[0.0, 0.0]])
    losses, gradient = loss_and_gradient("rpo", batch, beta=2.0, eta=LN3, distance=distance)
    close(losses, wanted)
    # d / dz of each: q - p; q (log (q / p) - KL); 2 (gap).
    slope = {"bwd_kl": -1 / 4, "fwd_kl": 1 / 2 * (math.log(2 / 3) - wanted), "squared": -2 * LN3}[distance]
    torch.testing.assert_close(gradient, 2.0 * torch.tensor([slope, -slope], dtype=F64))


def test_squared_rpo_is_the_mean_over_pairs() -> None:
    # z - eta S = (2, 1, -1): squared differences 1, 9, 4.
    batch = batch_of([[0.0, 2.0, 1.0]], [[2.0, 2.0, -0.5]])
    close(run("rpo", batch, beta=1.0, eta=0.5, distance="squared").losses.tolist(), 14 / 3)


@pytest.mark.parametrize("distance", ["bwd_kl", "fwd_kl", "squared"])
def test_rpo_ends_where_rewards_are_the_scores(distance: str) -> None:
    batch = batch_of([[3.0, 1.0, 8.0]], [[6.0 + 1, 2.0 + 1, 16.0 + 1]])
    losses, gradient = loss_and_gradient("rpo", batch, beta=0.5, eta=1.0, distance=distance)
    close(losses, 0.0)
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)


def test_backward_rpo_has_the_gradient_of_infonca() -> None:
    batch = random_batch()
    _, gradient = loss_and_gradient("rpo", batch, beta=0.2, eta=0.5)
    _, wanted = loss_and_gradient("infonca", batch, beta=0.2, alpha=2.0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_softmax_dpo_by_hand() -> None:
    # Utilities 2, 3, 1 and the first is the best: 2/6. Of two best, the first counts.
    losses, gradient = loss_and_gradient(
        "softmax_dpo", batch_of([[5.0, 2.0, 5.0]], [[LN2, LN3, 0.0]]), beta=1.0
    )
    close(losses, LN3)
    torch.testing.assert_close(gradient, torch.tensor([2 / 6 - 1, 3 / 6, 1 / 6], dtype=F64))


def test_reference_free_mpo_of_two_is_simpo() -> None:
    batch = batch_of([[1.0, 3.0]], [[-4.0, -6.0]], lengths=[[2, 5]])
    losses, gradient = loss_and_gradient("mpo_reference_free", batch, beta=2.0, gamma=0.8)
    wanted, wanted_gradient = loss_and_gradient("simpo", batch, beta=2.0, gamma=0.8)
    close(losses, *wanted)
    torch.testing.assert_close(gradient, wanted_gradient)


def test_reference_free_mpo_by_hand() -> None:
    # Mean log-probs log 4, log 2, log 1 at beta 1 (not log-probs, but numbers); margin log 2 halves the preferred.
    batch = batch_of([[9.0, 8.0, 0.0]], [[2 * math.log(4), 3 * LN2, 0.0]], lengths=[[2, 3, 4]])
    close(run("mpo_reference_free", batch, beta=1.0, gamma=LN2).losses.tolist(), math.log(4 / 3))
