"""Pairs, and the losses on them, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from mpo_megatron.objectives import GroupBatch
from mpo_megatron.objectives.pairwise import PAIRS, Pairs
from mpo_megatron.ragged.groups import GroupIndex
from tests.helpers.objectives import F64, batch_of, loss_and_gradient, random_batch, run

LN2, LN3 = math.log(2), math.log(3)


def pairs_of(batch: GroupBatch, pairs: Pairs) -> set[tuple[int, int]]:
    taken = PAIRS[pairs](batch)
    first, second = (segments.segment[taken].tolist() for segments in (batch.index.first, batch.index.second))
    return set(zip(first, second, strict=True))


def test_pairs_by_hand() -> None:
    # Means 2.5 and 3.5; in the second group two are best, and two are worst.
    batch = batch_of([[3.0, 1.0, 4.0, 2.0], [2.0, 5.0, 5.0, 2.0]], [[0.0] * 4, [0.0] * 4])
    assert pairs_of(batch, "best_worst") == {(2, 1), (5, 4)}
    ordered = {(0, 1), (0, 3), (2, 0), (2, 1), (2, 3), (3, 1)}
    crossed = {(5, 4), (5, 7), (6, 4), (6, 7)}
    assert pairs_of(batch, "all") == ordered | crossed
    assert pairs_of(batch, "cross") == {(0, 1), (0, 3), (2, 1), (2, 3)} | crossed
    random = pairs_of(batch, "best_random")
    assert {better for better, _ in random} == {2, 5}
    assert random <= ordered | crossed


@pytest.mark.parametrize("pairs", PAIRS)
def test_equal_scores_make_no_pair(pairs: Pairs) -> None:
    batch = batch_of([[0.1] * 3, [2.0, 1.0]], [[1.0, 2.0, 3.0], [0.0, 0.0]])
    assert pairs_of(replace(batch, preferred=batch.scores == 2.0), pairs) == {(3, 4)}


def test_random_pairs_depend_on_the_responses_alone() -> None:
    batch = random_batch([5] * 40)
    drawn = dict(pairs_of(batch, "best_random"))
    assert dict(pairs_of(batch, "best_random")) == drawn
    for group in range(0, 40, 7):  # as in a row of its own
        of = batch.groups.segment == group
        alone = GroupBatch(
            batch.policy_logps[of], batch.reference_logps[of], batch.lengths[of], batch.scores[of],
            batch.preferred[of], batch.response_ids[of], GroupIndex.of([5]),
        )  # fmt: skip
        ((better, worse),) = pairs_of(alone, "best_random")
        assert drawn[5 * group + better] == 5 * group + worse


def test_random_pairs_are_uniform() -> None:
    groups = 4000
    batch = batch_of([[9.0, 1.0, 2.0, 3.0]] * groups, [[0.0] * 4] * groups)
    worse = torch.tensor([worse for _, worse in sorted(pairs_of(batch, "best_random"))])
    counts = torch.bincount(worse % 4, minlength=4)
    assert counts[0] == 0
    # Each 4000 / 3, with a standard deviation of 30.
    assert (counts[1:] - groups / 3).abs().max() < 120
    # The choice of one group says nothing of the next: 4000 / 9 of each pair, with a standard deviation of 20.
    following = torch.bincount((worse[:-1] % 4 - 1) * 3 + worse[1:] % 4 - 1, minlength=9)
    assert (following - groups / 9).abs().max() < 80


def test_dpo_by_hand() -> None:
    # beta r = (0, log 3): the better response loses with 3/4.
    losses, gradient = loss_and_gradient("dpo", batch_of([[1.0, 0.0]], [[0.0, 2 * LN3]]), beta=0.5)
    assert losses == pytest.approx([math.log(4)])
    torch.testing.assert_close(gradient, torch.tensor([-3 / 8, 3 / 8], dtype=F64))


def test_dpo_of_all_pairs_is_their_mean() -> None:
    # Utilities 3, 1, 1 for scores 2, 1, 0: pairs 3:1, 3:1, 1:1.
    batch = batch_of([[2.0, 1.0, 0.0]], [[LN3, 0.0, 0.0]])
    wanted = (2 * math.log(4 / 3) + math.log(2)) / 3
    assert run("dpo_all_pairs", batch, beta=1.0).losses.tolist() == pytest.approx([wanted])
    # Mean 1: only the first is preferred, against the other two.
    wanted = math.log(4 / 3)
    assert run("dpo_cross_pairs", batch, beta=1.0).losses.tolist() == pytest.approx([wanted])


def test_all_pairs_of_two_are_dpo_and_mpo() -> None:
    batch = random_batch([2] * 20)
    wanted = run("dpo", batch, beta=0.7).losses
    for name in (
        "dpo_best_random",
        "dpo_all_pairs",
        "dpo_cross_pairs",
        "mpo",
        "softmax_dpo",
        "plackett_luce",
    ):
        torch.testing.assert_close(run(name, batch, beta=0.7).losses, wanted, rtol=0, atol=1e-12)


def test_label_smoothing_by_hand() -> None:
    batch = batch_of([[1.0, 0.0]], [[LN3, 0.0]])
    losses, gradient = loss_and_gradient("dpo", batch, beta=1.0, label_smoothing=0.1)
    assert losses == pytest.approx([0.9 * math.log(4 / 3) + 0.1 * math.log(4)])
    slope = -0.9 / 4 + 0.1 * 3 / 4
    torch.testing.assert_close(gradient, torch.tensor([slope, -slope], dtype=F64))
    # At the margin where sigma is 1 - epsilon there is nothing left to learn.
    done = batch_of([[1.0, 0.0]], [[math.log(9), 0.0]])
    _, gradient = loss_and_gradient("dpo", done, beta=1.0, label_smoothing=0.1)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=F64), rtol=0, atol=1e-15)


def test_simpo_by_hand() -> None:
    # Mean log-probs -1 and -3, beta 1, gamma 2 - log 3: margin log 3.
    batch = batch_of([[5.0, 1.0]], [[-4.0, -6.0]], lengths=[[4, 2]])
    losses, gradient = loss_and_gradient("simpo", batch, beta=1.0, gamma=2 - LN3)
    assert losses == pytest.approx([math.log(4 / 3)])
    torch.testing.assert_close(gradient, torch.tensor([-1 / 16, 1 / 8], dtype=F64))


def test_ipo_by_hand() -> None:
    # r / |y| = (1, -1/2), target 1 / (2 beta) = 2: (3/2 - 2)^2.
    batch = batch_of([[5.0, 1.0]], [[4.0, -1.0]], lengths=[[4, 2]])
    losses, gradient = loss_and_gradient("ipo", batch, beta=0.25)
    assert losses == pytest.approx([1 / 4])
    torch.testing.assert_close(gradient, torch.tensor([-1 / 4, 1 / 2], dtype=F64))
    # Sums: (5 - 2)^2, beyond the target, so that the better response comes down.
    losses, gradient = loss_and_gradient("ipo", batch, beta=0.25, length_normalised=False)
    assert losses == pytest.approx([9.0])
    torch.testing.assert_close(gradient, torch.tensor([6.0, -6.0], dtype=F64))


def test_r_dpo_by_hand() -> None:
    # beta r equal; lengths 10 and 4 at alpha log 3 / 6: the longer better response counts as ahead by log 3.
    batch = batch_of([[5.0, 1.0], [1.0, 5.0]], [[1.0, 1.0]] * 2, lengths=[[10, 4]] * 2)
    losses, gradient = loss_and_gradient("r_dpo", batch, beta=1.0, alpha=LN3 / 6)
    assert losses == pytest.approx([math.log(4 / 3), math.log(4)], rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor([-1 / 4, 1 / 4, 3 / 4, -3 / 4], dtype=F64))


def test_r_dpo_without_alpha_or_with_equal_lengths_is_dpo() -> None:
    batch = random_batch()
    wanted = run("dpo", batch, beta=0.3).losses
    torch.testing.assert_close(run("r_dpo", batch, beta=0.3, alpha=0.0).losses, wanted)
    same = replace(batch, lengths=torch.full_like(batch.lengths, 7))
    torch.testing.assert_close(run("r_dpo", same, beta=0.3, alpha=5.0).losses, wanted)


def test_orpo_by_hand() -> None:
    # Probabilities per token 3/4 and 1/2: odds 3 and 1.
    batch = batch_of([[5.0, 1.0]], [[3 * math.log(3 / 4), 2 * math.log(1 / 2)]], lengths=[[3, 2]])
    losses, gradient = loss_and_gradient("orpo", batch, beta=0.2)
    assert losses == pytest.approx([1.2 * math.log(4 / 3)])
    # d a_w = -1 - beta / 4 / (1 - p_w), d a_l = beta / 4 / (1 - p_l), over the lengths.
    wanted = torch.tensor([(-1 - 0.2) / 3, 0.1 / 2], dtype=F64)
    torch.testing.assert_close(gradient, wanted)


def test_orpo_of_a_certain_response_is_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        batch = batch_of([[5.0, 1.0], [1.0, 5.0]], [[0.0, -1.0]] * 2, dtype=dtype)
        losses, gradient = loss_and_gradient("orpo", batch, beta=0.2)
        assert all(map(math.isfinite, losses))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["simpo", "ipo", "r_dpo", "orpo"])
def test_the_pairs_are_a_setting(name: str) -> None:
    from tests.helpers.objectives import SETTINGS

    batch = random_batch([4] * 6)
    found = [run(name, batch, **SETTINGS[name], pairs=pairs).losses for pairs in PAIRS]
    torch.testing.assert_close(found[0], run(name, batch).losses)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])
