"""What holds for every objective, or for a named part of them: the registry's claims, shifts, raggedness, extremes."""

from dataclasses import replace

import pytest
import torch

from mpo_megatron.objectives import GroupBatch, get, names
from mpo_megatron.ragged.groups import GroupIndex
from tests.helpers.objectives import SETTINGS, batch_of, loss_and_gradient, random_batch, run

# Adding a constant to the log-probs of a whole group changes nothing where z is compared within the group ...
COMPARES_LOGPS = {
    "mpo", "wmpo", "softmax_dpo", "dpo", "dpo_best_random", "dpo_all_pairs", "dpo_cross_pairs", "r_dpo",
    "plackett_luce", "ordered_bins", "infonca", "rpo",
}  # fmt: skip
# ... and must change something where each response has a target of its own, or counts by its length.
ALONE = {
    "nca", "kto", "sppo", "grpo_offline", "sft", "ipo", "simpo", "mpo_reference_free", "orpo"
}  # fmt: skip


def part(batch: GroupBatch, group: int) -> GroupBatch:
    """One group of a batch."""
    of = batch.groups.segment == group
    return GroupBatch(
        batch.policy_logps.detach()[of].requires_grad_(), batch.reference_logps[of], batch.lengths[of],
        batch.scores[of], batch.preferred[of], batch.response_ids[of], GroupIndex.of([int(of.sum())]),
    )  # fmt: skip


def test_the_table_is_complete() -> None:
    assert set(names()) == SETTINGS.keys() == COMPARES_LOGPS | ALONE
    for name in names():
        entry = get(name)
        assert entry.name == name
        assert all((entry.contrasts, entry.source, entry.settings, entry.function.__doc__))


@pytest.mark.parametrize("name", SETTINGS)
def test_groups_of_any_size_count_as_if_alone(name: str) -> None:
    batch = random_batch()
    if name == "kto":  # with a reference point of 0 its groups are independent too
        batch = replace(batch, policy_logps=(batch.policy_logps.detach() - 5).requires_grad_())
    losses, gradient = loss_and_gradient(name, batch)
    for group in range(batch.num_groups):
        (alone,), alone_gradient = loss_and_gradient(name, part(batch, group))
        assert losses[group] == pytest.approx(alone, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(
            gradient[batch.groups.segment == group], alone_gradient, rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    """Against finite differences; KTO's holds its reference point, as it must: see test_pointwise."""
    if name == "kto":
        return
    batch = random_batch(seed=1)

    def losses(logps: torch.Tensor) -> torch.Tensor:
        return run(name, replace(batch, policy_logps=logps)).losses

    assert torch.autograd.gradcheck(losses, (batch.policy_logps,))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_without_groups_has_no_loss(name: str) -> None:
    batch = part(random_batch(), 7)
    result = run(name, replace(batch, index=GroupIndex.of([])))
    assert result.losses.shape == result.rewards.shape == (0,)
    result.losses.sum().backward()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_is_read_where_the_table_says(name: str) -> None:
    batch = random_batch()
    unread = replace(batch, reference_logps=torch.full_like(batch.reference_logps, torch.nan))
    losses, rewards = (getattr(run(name, unread), field) for field in ("losses", "rewards"))
    if get(name).needs_reference:
        assert losses.isnan().all()
        assert rewards.isnan().all()
    else:
        torch.testing.assert_close(losses, run(name, batch).losses, rtol=0, atol=0)
        assert rewards.isfinite().all()


@pytest.mark.parametrize("name", SETTINGS)
def test_only_kto_lets_one_group_move_another(name: str) -> None:
    batch = random_batch()
    moved = batch.policy_logps.detach().clone()
    moved[batch.groups.segment == 3] += torch.arange(8.0)  # mean of r rises
    losses = run(name, replace(batch, policy_logps=moved)).losses
    others = torch.arange(batch.num_groups) != 3
    same = torch.equal(losses[others], run(name, batch).losses[others])
    assert same == (not get(name).needs_global_batch)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_shift_of_all_scores_of_a_group_changes_nothing(name: str) -> None:
    batch = random_batch()
    shifted = replace(
        batch, scores=batch.scores + torch.tensor([3.0, -5.0, 0.0, 100.0, 7.0])[batch.groups.segment]
    )
    torch.testing.assert_close(run(name, shifted).losses, run(name, batch).losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_shift_of_all_log_probs_of_a_group(name: str) -> None:
    batch = random_batch()
    shifted = replace(batch, policy_logps=batch.policy_logps - 3)
    losses, found = run(name, batch).losses, run(name, shifted).losses
    if name in COMPARES_LOGPS:
        torch.testing.assert_close(found, losses, rtol=1e-11, atol=1e-11)
    else:
        assert (found - losses).abs().max() > 1e-2


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_step_raises_the_best_response(name: str) -> None:
    """At policy = reference; and of what contrasts, lowers the worst."""
    batch = batch_of([[1.0, 9.0, 2.0, 0.5]], [[0.0] * 4], lengths=[[5] * 4], reference=-7.0)
    _, gradient = loss_and_gradient(name, batch)
    assert gradient[1] < -1e-3
    if name != "sft":
        assert gradient[3 if name != "dpo_best_random" else slice(None)].max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_extreme_log_ratios_keep_finite_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    settings = {**SETTINGS[name], "beta": 1.0} if "beta" in SETTINGS[name] else SETTINGS[name]
    scores = [[9.0, 5.0, 1.0], [1.0, 5.0, 9.0], [2.0, 1.0], [2.0, 1.0]]
    ratios = [[1e4, 0.0, -1e4], [1e4, 0.0, -1e4], [1e4, -1e4], [-1e4, 1e4]]
    reference = 0.0 if get(name).needs_reference else -2e4  # log-probs alone are below 0
    batch = batch_of(scores, ratios, reference=reference, dtype=dtype)
    losses, gradient = loss_and_gradient(name, batch, **settings)
    assert all(torch.tensor(losses).isfinite())
    assert gradient.isfinite().all()
    if name in COMPARES_LOGPS:
        # Groups 1 and 3 are as wrong as can be: a full gradient raises the best and lowers the most likely.
        assert gradient[5] < -0.3
        assert gradient[3] > 0.3 if name != "dpo_best_random" else gradient[3:5].max() > 0.3
        torch.testing.assert_close(
            gradient[8:].double(), torch.tensor([-1.0, 1.0]).double() * -gradient[8].item()
        )
        if name not in ("infonca", "rpo"):  # these want no more than the scores' distribution
            assert gradient[6:8].abs().max() < 0.2


@pytest.mark.parametrize("name", [name for name in SETTINGS if not get(name).needs_partition])
def test_equal_scores_are_no_error_where_scores_alone_count(name: str) -> None:
    batch = batch_of([[0.1, 0.1, 0.1]], [[0.5, 0.0, -0.5]], lengths=[[3, 4, 5]])
    losses, gradient = loss_and_gradient(name, replace(batch, scores=batch.scores.float().double()))
    assert all(torch.tensor(losses).isfinite())
    assert gradient.isfinite().all()
    if name == "grpo_offline":
        assert losses == [0.0]
