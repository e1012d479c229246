"""The win rate of a trained model against its base model, and what it would be at equal length.

A battle is a pair of responses to the same prompt, one of each model. Its outcome y is in [0, 1]: 1 if the trained
model's response has the higher score, 1/2 if the scores are equal, or what a Bradley-Terry model makes of the scores:
1 / (1 + exp(s_base - s_trained)). The length-controlled rate is AlpacaEval 2's (Dubois et al., 2024, arXiv:2404.04475),
a logistic regression on the difference of lengths (in characters, as theirs), evaluated where it is 0:

    logit P(win) = theta + phi tanh(d / std(d)),   d = length_trained - length_base,   rate = 1 / (1 + exp(-theta))

The plain rate is the same model without phi: the mean of y. Outcomes between 0 and 1 make both fractional logits
(Papke and Wooldridge, 1996), so that standard errors are of the sandwich, which does not take y for a coin. n and m
samples of a prompt give n m battles, each with weight 1 / (n m), and errors are clustered by prompt.

Two terms of AlpacaEval's are left out. Its instruction difficulty, a number for each of its 805 instructions, was
fitted on the answers of all models of its leaderboard; prompts of one's own have two models. Its regularisation
towards adversarial baselines needs their annotations of the same instructions. Without them the rate at equal length
is one number, not a mean over instructions.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy import special, stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning, SpecificationWarning

from mpo_megatron.evaluation.pairs import Pair
from mpo_megatron.means import mean_and_error

LEVEL = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its 95% confidence interval; None where there is none, as of a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Battles:
    """[B] each: `prompts` numbers a battle's prompt, `outcomes` is in [0, 1], `lengths` is trained minus base."""

    prompts: NDArray[np.int64]
    outcomes: Floats
    lengths: Floats

    @property
    def count(self) -> int:
        """Prompts."""
        return int(self.prompts[-1]) + 1

    def weights(self) -> Floats:
        """[B], sum 1 for each prompt."""
        return 1 / np.bincount(self.prompts)[self.prompts]


@dataclass(frozen=True)
class LengthControlled:
    """`rate` at equal length, and `length_effect` phi; or why there is none."""

    rate: Estimate | None
    length_effect: float | None = None
    reason: str = ""


def battles(pairs: Sequence[Pair], *, bradley_terry: bool = False) -> Battles:
    """Every response of the trained model against every one of the base model's to the same prompt.

    Args:
        bradley_terry: scores are logits of preference; otherwise the higher one wins.
    """
    prompts, differences, lengths = [], [], []
    for number, (base, trained) in enumerate(pairs):
        for theirs in base["responses"]:
            for ours in trained["responses"]:
                prompts.append(number)
                differences.append(ours["score"] - theirs["score"])
                lengths.append(len(ours["text"]) - len(theirs["text"]))
    difference = np.array(differences, dtype=np.float64)
    return Battles(
        prompts=np.array(prompts, dtype=np.int64),
        outcomes=special.expit(difference) if bradley_terry else (np.sign(difference) + 1) / 2,
        lengths=np.array(lengths, dtype=np.float64),
    )


def win_rate(fought: Battles) -> Estimate:
    """The mean over prompts of the mean outcome of its battles.

    The interval is symmetric in logits and so inside of [0, 1]; where all are won or all lost, and the logit is
    infinite, it is Wilson's.
    """
    for certain in (0.0, 1.0):
        if (fought.outcomes == certain).all():
            low, high = proportion_confint(certain * fought.count, fought.count, 1 - LEVEL, method="wilson")
            return Estimate(certain, float(low), float(high))
    return _rate(_fitted(fought, np.ones((len(fought.outcomes), 1))), fought.count - 1)


def length_controlled(fought: Battles) -> LengthControlled:
    """The rate at equal length."""
    if not fought.lengths.any():
        return LengthControlled(win_rate(fought), 0.0)
    spread = fought.lengths.std(ddof=1) if len(fought.lengths) > 1 else 0.0
    length = np.tanh(fought.lengths / spread) if spread else np.ones_like(fought.lengths)
    # Far from 0 the tanh of different lengths is the same: it says nothing of equal lengths.
    if np.ptp(length) < 0.01:
        return LengthControlled(
            None, reason="all answers differ from the base model's by much the same length"
        )
    if _separated(length, fought.outcomes):
        return LengthControlled(None, reason="the lengths alone tell wins from losses")
    fit = _fitted(fought, np.column_stack([np.ones_like(length), length]))
    return LengthControlled(_rate(fit, fought.count - 2), float(fit.params[1]))


def mean(values: Sequence[float]) -> Estimate:
    """The mean with Student's interval."""
    value, error = mean_and_error(values)
    if error is None:
        return Estimate(value, None, None)
    width = _quantile(len(values) - 1) * error
    return Estimate(value, value - width, value + width)


def _fitted(fought: Battles, regressors: Floats) -> Any:
    """The regression of the outcomes on `regressors` [B, K], of which the first is the constant."""
    few = fought.count <= regressors.shape[1]
    clustered = {} if few else {"cov_type": "cluster", "cov_kwds": {"groups": fought.prompts}}
    model = sm.GLM(fought.outcomes, regressors, family=sm.families.Binomial(), var_weights=fought.weights())
    with warnings.catch_warnings():
        # The sandwich with these weights is what it should be (tests/unit/evaluation/test_win_rate.py); and a fit that
        # meets every outcome, as of two prompts, is no fault.
        warnings.simplefilter("ignore", SpecificationWarning)
        warnings.simplefilter("ignore", PerfectSeparationWarning)
        # By default it ends by the deviance, which is flat there.
        return model.fit(tol=1e-8, tol_criterion="params", **clustered)


def _rate(fit: Any, free: int) -> Estimate:
    """Where all regressors but the constant are 0; `free` prompts more than there are regressors."""
    theta = float(fit.params[0])
    width = _quantile(free) * float(fit.bse[0]) if free > 0 else None
    low, high = (None, None) if width is None else special.expit([theta - width, theta + width]).tolist()
    return Estimate(float(special.expit(theta)), low, high)


def _quantile(free: int) -> float:
    """Of Student's distribution with so many degrees of freedom: half of an interval in standard errors."""
    return float(stats.t.ppf((1 + LEVEL) / 2, free))


def _separated(x: Floats, y: Floats) -> bool:
    """Whether a threshold of `x` has all wins on one side and all losses on the other: no coefficient is best then."""
    won, lost = x[y > 0], x[y < 1]
    return not len(won) or not len(lost) or lost.max() <= won.min() or won.max() <= lost.min()
