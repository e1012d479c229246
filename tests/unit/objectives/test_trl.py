"""Losses and gradients against TRL's own code on the same log-probs, where TRL has the objective.

TRL 1.16 has no R-DPO (its `ld_alpha` is LD-DPO); test_pairwise has numbers by hand for it.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpo_megatron.objectives import GroupBatch, get
from mpo_megatron.ragged.groups import GroupIndex
from tests.helpers.objectives import F64

PAIRS, TOKENS = 6, 9


class Tokens:
    """Log-probs by token of some pairs, the first row of each pair the better; and their reference log-probs."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(4)
        lengths = torch.randint(1, TOKENS + 1, (PAIRS, 2), generator=random)
        self.mask = torch.arange(TOKENS) < lengths[..., None]  # [pairs, 2, tokens]
        self.logps = torch.rand((PAIRS, 2, TOKENS), generator=random, dtype=F64) * -3
        self.logps.requires_grad_()
        self.reference = (self.logps.detach() * self.mask).sum(2)
        self.reference += 3 * torch.randn((PAIRS, 2), generator=random, dtype=F64)

    @property
    def lengths(self) -> torch.Tensor:
        return self.mask.sum(2)

    @property
    def sums(self) -> torch.Tensor:
        return (self.logps * self.mask).sum(2)

    def batch(self, gap: float) -> GroupBatch:
        """Each pair as a group, its scores `gap` apart."""
        return GroupBatch(
            policy_logps=self.sums.flatten(),
            reference_logps=self.reference.flatten(),
            lengths=self.lengths.flatten(),
            scores=torch.tensor([gap, 0.0], dtype=F64).repeat(PAIRS),
            preferred=torch.tensor([True, False]).repeat(PAIRS),
            response_ids=torch.arange(2 * PAIRS),
            index=GroupIndex.of([2] * PAIRS),
        )


def trainer(**settings: Any) -> SimpleNamespace:
    """What a trainer of TRL holds as far as its loss reads it, on one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda value: value, gather=lambda value: value
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, alpha=0.0, **settings,
    )  # fmt: skip


def outputs(logps: torch.Tensor) -> SimpleNamespace:
    """A model's output with these log-probs [rows, tokens]."""
    unread = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=unread, mean_logits=unread, is_top1=unread.bool())


def with_prompt(mask: torch.Tensor) -> torch.Tensor:
    """The mask [rows, tokens] behind a prompt of one token."""
    return torch.cat((torch.zeros(len(mask), 1), mask), 1).long()


def trl_dpo(tokens: Tokens, loss_type: str, beta: float) -> torch.Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    def stacked(values: torch.Tensor) -> torch.Tensor:  # all better ones, then all worse ones
        return values.transpose(0, 1).flatten(0, 1)

    mask = with_prompt(stacked(tokens.mask))
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": tokens.reference[:, 0],
        "ref_rejected_logps": tokens.reference[:, 1],
    }
    model = lambda **_: outputs(stacked(tokens.logps * tokens.mask))  # noqa: E731
    this = trainer(loss_types=[loss_type], beta=beta, label_smoothing=0.0)
    return DPOTrainer._compute_loss(this, model, inputs, False)


def trl_cpo(tokens: Tokens, loss_type: str, beta: float, gamma: float, smoothing: float) -> torch.Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    this = trainer(loss_type=loss_type, beta=beta, simpo_gamma=gamma, label_smoothing=smoothing)
    # With a reference DPO's margin is that of CPO on log-ratios.
    values = tokens.sums / tokens.lengths if loss_type == "simpo" else tokens.sums - tokens.reference
    losses, _, _ = CPOTrainer.cpo_loss(this, values[:, 0], values[:, 1])
    return losses.mean()


def trl_orpo(tokens: Tokens, beta: float) -> torch.Tensor:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    average = tokens.sums / tokens.lengths
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=beta), average[:, 0], average[:, 1])
    return (-average[:, 0] - losses).mean()


def trl_kto(tokens: Tokens, beta: float) -> torch.Tensor:
    from trl.trainer.kto_trainer import KTOTrainer

    mask = with_prompt(tokens.mask.flatten(0, 1))
    flat = tokens.logps * tokens.mask
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "label": torch.tensor([1, 0]).repeat(PAIRS), "ref_logps": tokens.reference.flatten()}  # fmt: skip
    # The matched reference point: the very completions in the place of mismatched ones.
    inputs |= {"KL_input_ids": mask, "KL_attention_mask": mask, "KL_completion_mask": mask,
               "ref_KL_logps": tokens.reference.flatten()}  # fmt: skip
    this = trainer(
        loss_type="kto", beta=beta, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.5
    )
    this._compute_kl_logps = functools.partial(KTOTrainer._compute_kl_logps, this)
    return KTOTrainer._compute_loss(this, lambda **_: outputs(flat.flatten(0, 1)), inputs, False)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tokens], torch.Tensor]]] = {
    "dpo": ("dpo", {"beta": 0.2}, lambda t: trl_dpo(t, "sigmoid", 0.2)),
    "dpo, label smoothing": (
        "dpo", {"beta": 0.2, "label_smoothing": 0.1}, lambda t: trl_cpo(t, "sigmoid", 0.2, 0.0, 0.1)
    ),
    "ipo": ("ipo", {"beta": 0.2}, lambda t: trl_dpo(t, "ipo", 0.2)),
    "nca": ("nca", {"beta": 0.2, "alpha": 1.0}, lambda t: trl_dpo(t, "nca_pair", 0.2)),
    "sppo": ("sppo", {"beta": 0.2}, lambda t: trl_dpo(t, "sppo_hard", 0.2)),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.5}, lambda t: trl_cpo(t, "simpo", 2.0, 0.5, 0.0)),
    "simpo, label smoothing": (
        "simpo", {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1}, lambda t: trl_cpo(t, "simpo", 2.0, 0.5, 0.1)
    ),
    "orpo": ("orpo", {"beta": 0.2}, lambda t: trl_orpo(t, 0.2)),
    "kto": ("kto", {"beta": 0.2, "undesirable_weight": 1.5}, lambda t: trl_kto(t, 0.2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_equal_to_trl(case: str) -> None:
    name, settings, trl = CASES[case]
    tokens = Tokens()
    # Scores a thousand apart: one-hot targets for NCA, a sure win for SPPO.
    ours = get(name)(tokens.batch(gap=1e3), **settings).losses.mean()
    theirs = trl(tokens)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(ours, tokens.logps)
    (wanted,) = torch.autograd.grad(theirs, tokens.logps)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
