"""MPO and W-MPO against numbers worked out by hand, limits, and the gradient of Lemma 6."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mpo_megatron
from mpo_megatron import mpo_loss
from mpo_megatron.objectives import GroupBatch, get, names
from mpo_megatron.objectives.metrics import METRICS, group_metrics
from mpo_megatron.ragged.groups import GroupIndex

F64 = torch.float64


def rows(*values: list[float], grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=F64, requires_grad=grad)


def test_hand_worked_group() -> None:
    # r = (1, 0, -1), beta 0.5, scores (3, 0, 0): Y+ = {1}. Loss = log(e^.5 + 1 + e^-.5) - .5.
    loss = mpo_loss(rows([1.0, 0.0, -1.0]), rows([0.0, 0.0, 0.0]), rows([3.0, 0.0, 0.0]), beta=0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(0.5) + 1 + math.exp(-0.5)) - 0.5, abs=1e-12)


def test_hand_worked_weights() -> None:
    # Scores (3, 0, 0): mean 1, |dW| = (2, 1, 1). With r = 0 and alpha = log 2 the utilities are 4, 2, 2: P(Y+) = 1/2.
    zero, scores, alpha = rows([0.0, 0.0, 0.0]), rows([3.0, 0.0, 0.0]), math.log(2)
    absolute = mpo_loss(zero, zero, scores, beta=1.0, alpha=alpha)
    signed = mpo_loss(zero, zero, scores, beta=1.0, alpha=alpha, weighting="signed")
    unweighted = mpo_loss(zero, zero, scores, beta=1.0, alpha=alpha, weighting="none")
    assert absolute.item() == pytest.approx(math.log(2), abs=1e-12)
    assert signed.item() == pytest.approx(math.log(5 / 4), abs=1e-12)  # utilities 4, 1/2, 1/2
    assert unweighted.item() == pytest.approx(math.log(3), abs=1e-12)


def test_two_responses_without_weights_are_dpo() -> None:
    policy, reference = torch.randn(5, 2, dtype=F64), torch.randn(5, 2, dtype=F64)
    ratio = policy - reference
    dpo = -F.logsigmoid(0.3 * (ratio[:, 0] - ratio[:, 1]))
    ours = mpo_loss(policy, reference, rows([1.0, 0.0]).expand(5, 2), beta=0.3, reduction="none")
    torch.testing.assert_close(ours, dpo, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-20, 20), st.floats(0, 10)), min_size=2, max_size=9),
    st.floats(0.01, 2),
    st.floats(0, 1),
)
def test_gradient_is_lemma_6(responses: list[tuple[float, float]], beta: float, alpha: float) -> None:
    policy = rows([r for r, _ in responses], grad=True)
    scores = rows([s for _, s in responses])
    preferred = scores > scores.mean()
    if not preferred.any() or scores.max() == scores.min():
        return
    mpo_loss(policy, torch.zeros_like(scores), scores, beta=beta, alpha=alpha).backward()
    z = beta * policy.detach() + alpha * (scores - scores.mean()).abs()
    q = torch.softmax(z.masked_fill(~preferred, -torch.inf), 1)
    torch.testing.assert_close(policy.grad, beta * (torch.softmax(z, 1) - q), rtol=1e-9, atol=1e-12)


def clamped_loss(z: torch.Tensor, preferred: torch.Tensor) -> torch.Tensor:
    """The loss as the paper's Appendix K computes it: probabilities clamped at 1e-10."""
    p = torch.softmax(z, 1)
    chosen = (p * preferred).sum(1).clamp(min=1e-10)
    rejected = (p * ~preferred).sum(1).clamp(min=1e-10)
    return -torch.log(chosen / (chosen + rejected + 2e-10))


def test_the_papers_code_agrees_where_it_does_not_clamp() -> None:
    policy, scores = 5 * torch.randn(200, 5, dtype=F64), torch.randn(200, 5, dtype=F64)
    ours = mpo_loss(policy, torch.zeros_like(policy), scores, beta=0.5, alpha=0.3, reduction="none")
    deviation = scores - scores.mean(1, keepdim=True)
    theirs = clamped_loss(0.5 * policy + 0.3 * deviation.abs(), deviation > 0)
    assert ours.max() > 5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_where_the_papers_code_saturates_ours_keeps_the_gradient_of_lemma_6() -> None:
    # P(Y+) = e^-30 / (e^-30 + 2), about 5e-14.
    ours, theirs = (rows([-30.0, 0.0, 0.0], grad=True) for _ in range(2))
    mpo_loss(ours, rows([0.0] * 3), rows([1.0, 0.0, 0.0]), beta=1.0).backward()
    clamped_loss(theirs, rows([1.0, 0.0, 0.0]) > 0).sum().backward()
    assert theirs.grad is not None
    assert theirs.grad.abs().max() < 1e-12
    torch.testing.assert_close(ours.grad, rows([-1.0, 0.5, 0.5]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_rewards_keep_value_and_gradient(size: float) -> None:
    # The preferred response is far below (loss ~ |size|, full gradient) or far above (loss ~ 0, no gradient).
    policy = torch.tensor([[-size, 0.0, 0.0]], requires_grad=True)
    loss = mpo_loss(policy, torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), beta=1.0)
    loss.backward()
    if size > 0:
        assert loss.item() == pytest.approx(size + math.log(2), rel=1e-6)
        torch.testing.assert_close(policy.grad, torch.tensor([[-1.0, 0.5, 0.5]]))
    else:
        assert loss.item() == pytest.approx(0.0, abs=1e-6)
        torch.testing.assert_close(policy.grad, torch.zeros(1, 3))


def test_untrained_policy_has_loss_of_the_counts() -> None:
    logps = torch.randn(2, 4)
    scores = torch.tensor([[1.0, 2.0, 3.0, 9.0], [5.0, 5.0, 0.0, 0.0]])
    losses = mpo_loss(logps, logps, scores, beta=0.1, reduction="none")
    torch.testing.assert_close(losses, torch.tensor([4 / 1, 4 / 2]).log())


def test_mask_cuts_ragged_groups() -> None:
    policy, reference, scores = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    filler = torch.where(mask, policy, torch.nan)
    ragged = mpo_loss(filler, reference, scores, beta=0.2, alpha=0.3, mask=mask, reduction="none")
    short = mpo_loss(policy[:1, :3], reference[:1, :3], scores[:1, :3], beta=0.2, alpha=0.3)
    full = mpo_loss(policy[1:], reference[1:], scores[1:], beta=0.2, alpha=0.3)
    torch.testing.assert_close(ragged, torch.stack((short, full)))


def test_groups_without_a_preferred_response_do_not_count() -> None:
    policy = torch.randn(2, 3, requires_grad=True)
    reference = torch.randn(2, 3)
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]])  # the float32 mean of the second is not 0.1
    loss = mpo_loss(policy, reference, scores, beta=0.1)
    loss.backward()
    torch.testing.assert_close(loss, mpo_loss(policy[:1], reference[:1], scores[:1], beta=0.1))
    assert policy.grad is not None
    assert torch.equal(policy.grad[1], torch.zeros(3))
    assert mpo_loss(policy[1:], reference[1:], scores[1:], beta=0.1).item() == 0


def test_shifts_that_must_not_matter() -> None:
    policy, reference, scores = (torch.randn(3, 5, dtype=F64) for _ in range(3))
    loss = mpo_loss(policy, reference, scores, beta=0.4, alpha=0.7)
    torch.testing.assert_close(mpo_loss(policy + 7, reference, scores, beta=0.4, alpha=0.7), loss)
    torch.testing.assert_close(mpo_loss(policy, reference, scores + 100, beta=0.4, alpha=0.7), loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(1, 2)}, "must have one shape"),
        ({"mask": torch.ones(1, 2)}, "mask"),
        ({"weighting": "square"}, "weighting='square'"),
        ({"reduction": "median"}, "reduction='median'"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    arguments = {"scores": torch.zeros(1, 3), "beta": 0.1} | change
    with pytest.raises(ValueError, match=message):
        mpo_loss(torch.zeros(1, 3), torch.zeros(1, 3), **arguments)


def test_mpo_loss_needs_no_megatron() -> None:
    """In a fresh process: the import, the docstring's example, and no Megatron, NeMo or CUDA behind it."""
    code = (
        "import doctest, sys, torch; from mpo_megatron import mpo_loss; import mpo_megatron.objectives.mpo as m;"
        "result = doctest.testmod(m, extraglobs={'torch': torch}); assert result.attempted >= 4 and not result.failed;"
        "assert not {'megatron', 'nemo', 'transformers'} & set(sys.modules); assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert mpo_megatron.__all__ == ["__version__", "mpo_loss"]


def flat_batch() -> GroupBatch:
    return GroupBatch(
        policy_logps=torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0]),
        reference_logps=torch.tensor([-2.0, -2.0, -2.0, -1.0, -1.0]),
        lengths=torch.ones(5),
        scores=torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0]),
        preferred=torch.tensor([True, False, False, True, False]),
        response_ids=torch.arange(5),
        index=GroupIndex.of([3, 2]),
    )


def test_registry_lists_both_and_names_what_is_unknown() -> None:
    assert {"mpo", "wmpo"} <= set(names())
    with pytest.raises(ValueError, match=r"objective=dop is not known; choose one of .*mpo"):
        get("dop")


def test_flat_and_padded_forms_agree() -> None:
    batch = flat_batch()
    flat = get("wmpo")(batch, beta=0.5, alpha=0.2, weighting="absolute").losses
    pad = torch.zeros(1)
    padded = mpo_loss(
        torch.stack((batch.policy_logps[:3], torch.cat((batch.policy_logps[3:], pad)))),
        torch.stack((batch.reference_logps[:3], torch.cat((batch.reference_logps[3:], pad)))),
        torch.stack((batch.scores[:3], torch.cat((batch.scores[3:], pad)))),
        beta=0.5,
        alpha=0.2,
        mask=torch.tensor([[True] * 3, [True, True, False]]),
        reduction="none",
    )
    torch.testing.assert_close(flat, padded)


def test_metrics_by_hand() -> None:
    batch = flat_batch()
    values = dict(zip(METRICS, group_metrics(batch, get("mpo")(batch, beta=0.5)), strict=True))
    # Rewards 0.5 * (1, 0, -1) and 0.5 * (0, 0): margins 0.5 - (-0.25) and 0; both pairs right, then one tie.
    torch.testing.assert_close(values["reward_margin"], torch.tensor([0.75, 0.0]))
    torch.testing.assert_close(values["accuracy"], torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(values["preferred_reward"], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(values["dispreferred_reward"], torch.tensor([-0.25, 0.0]))
