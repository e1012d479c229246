"""Win rates of outcomes made with known coefficients, and against alpaca_eval's own regression."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from mpo_megatron.evaluation.win_rate import Battles, Estimate, battles, length_controlled, mean, win_rate

THETA, PHI = 0.35, 0.9


def lengths_of(count: int, centre: float = 40.0) -> np.ndarray:
    return np.random.default_rng(3).normal(centre, 90, count).round()


def effect(lengths: np.ndarray) -> np.ndarray:
    return np.tanh(lengths / lengths.std(ddof=1))


def fought(outcomes: Any, lengths: Any, prompts: Any = None) -> Battles:
    """A battle for each prompt unless `prompts` numbers them."""
    numbers = np.arange(len(lengths)) if prompts is None else np.array(prompts)
    return Battles(numbers, np.array(outcomes, dtype=np.float64), np.array(lengths, dtype=np.float64))


def at_equal_length(battles: Battles) -> tuple[Estimate, float]:
    """The rate and phi, where there are any."""
    found = length_controlled(battles)
    assert found.rate is not None
    assert found.length_effect is not None
    return found.rate, found.length_effect


def test_known_coefficients_are_recovered():
    lengths = lengths_of(80)
    rate, found = at_equal_length(fought(special.expit(THETA + PHI * effect(lengths)), lengths))
    assert found == pytest.approx(PHI, abs=1e-10)
    assert rate.value == pytest.approx(special.expit(THETA), abs=1e-10)


def test_coefficients_of_wins_and_losses_are_recovered_within_their_interval():
    random = np.random.default_rng(0)
    lengths = random.normal(40, 90, 4000)
    held = 0
    for _ in range(100):
        won = random.random(4000) < special.expit(THETA + PHI * effect(lengths))
        rate, found = at_equal_length(fought(won, lengths))
        assert found == pytest.approx(PHI, abs=0.35)
        assert rate.low is not None
        assert rate.high is not None
        held += rate.low <= special.expit(THETA) <= rate.high
    assert 88 <= held <= 100  # 95 expected; fewer than 88 of 100 has probability 0.001


def test_a_planted_effect_of_length_is_taken_out():
    lengths = lengths_of(200, centre=120)
    planted = fought(special.expit(PHI * effect(lengths)), lengths)
    assert win_rate(planted).value > 0.6
    assert at_equal_length(planted)[0].value == pytest.approx(0.5, abs=1e-10)


def test_without_an_effect_of_length_both_rates_are_equal():
    lengths = lengths_of(60)
    # As many of each outcome at every length.
    outcomes, both = np.repeat([1.0, 0.5, 0.0, 1.0], 60), np.tile(lengths, 4)
    rate, found = at_equal_length(fought(outcomes, both))
    assert found == pytest.approx(0, abs=1e-10)
    assert rate.value == pytest.approx(0.625, abs=1e-10)
    assert win_rate(fought(outcomes, both)).value == pytest.approx(0.625, abs=1e-12)


def test_the_rate_is_the_mean_with_the_error_of_a_mean():
    random = np.random.default_rng(1)
    prompts = np.repeat(np.arange(40), random.integers(1, 7, 40))
    outcomes = random.choice([0, 0.5, 1], len(prompts), p=[0.3, 0.1, 0.6])
    found = win_rate(fought(outcomes, lengths_of(len(prompts)), prompts))
    means = [outcomes[prompts == prompt].mean() for prompt in range(40)]
    assert found.value == pytest.approx(np.mean(means), abs=1e-12)
    # The delta method: the error of the logit is that of the mean over p (1 - p).
    error = np.std(means, ddof=1) / math.sqrt(40) / (found.value * (1 - found.value))
    ends = special.expit(special.logit(found.value) + np.array([-1, 1]) * stats.t.ppf(0.975, 39) * error)
    assert [found.low, found.high] == pytest.approx(ends, abs=1e-10)


def test_errors_are_those_of_the_sandwich_clustered_by_prompt():
    random = np.random.default_rng(2)
    prompts = np.repeat(np.arange(50), random.integers(1, 9, 50))
    count = len(prompts)
    lengths = lengths_of(count)
    outcomes = (random.random(count) < special.expit(THETA + PHI * effect(lengths))).astype(float)
    weights = 1 / np.bincount(prompts)[prompts]
    regressors = np.column_stack([np.ones(count), effect(lengths)])
    rate, phi = at_equal_length(fought(outcomes, lengths, prompts))
    theta = special.logit(rate.value)
    chance = special.expit(regressors @ [theta, phi])
    scores = regressors * (weights * (outcomes - chance))[:, None]
    assert scores.sum(0) == pytest.approx([0, 0], abs=1e-9)  # the likelihood is at its largest
    bread = np.linalg.inv((regressors * (weights * chance * (1 - chance))[:, None]).T @ regressors)
    clusters = np.array([scores[prompts == prompt].sum(0) for prompt in range(50)])
    variance = (bread @ clusters.T @ clusters @ bread)[0, 0] * 50 / 49 * (count - 1) / (count - 2)
    width = stats.t.ppf(0.975, 48) * math.sqrt(variance)
    assert rate.low == pytest.approx(special.expit(theta - width), abs=1e-10)
    assert rate.high == pytest.approx(special.expit(theta + width), abs=1e-10)


def test_a_prompt_counts_once_however_often_it_was_sampled():
    lengths = lengths_of(30)
    outcomes = np.random.default_rng(5).choice([0, 0.5, 1], 30)
    once = fought(outcomes, lengths)
    order = np.repeat(np.arange(30), np.where(np.arange(30) < 10, 4, 1))
    again = Battles(order, outcomes[order], lengths[order])
    assert win_rate(again).value == pytest.approx(win_rate(once).value, abs=1e-12)
    assert [win_rate(again).low, win_rate(again).high] == pytest.approx(
        [win_rate(once).low, win_rate(once).high], abs=1e-10
    )


@pytest.mark.parametrize(("outcome", "ends"), [(1.0, (0.722467, 1.0)), (0.0, (0.0, 0.277533))])
def test_all_won_or_all_lost_has_wilsons_interval(outcome, ends):
    found = win_rate(fought([outcome] * 10, lengths_of(10)))
    assert found.value == outcome
    # 1 / (1 + z^2 / n) and its complement.
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-6)


def test_rates_that_no_data_give():
    lengths = lengths_of(12)
    none = length_controlled(fought(lengths > 20, lengths))
    assert (none.rate, none.reason) == (None, "the lengths alone tell wins from losses")
    assert length_controlled(fought([1.0] * 12, lengths)).reason == "the lengths alone tell wins from losses"
    alike = "all answers differ from the base model's by much the same length"
    far = 100_000 + lengths_of(40)
    for outcomes, all_longer in (([1, 0, 1], [5, 5, 5]), (np.tile([1, 0], 20), far)):
        same = length_controlled(fought(outcomes, all_longer))
        assert (same.rate, same.reason) == (None, alike)
    equal = fought([1, 0, 1, 0.5], [0, 0, 0, 0])
    assert length_controlled(equal).rate == win_rate(equal)
    single = win_rate(fought([0.5, 1], [3, 4], [0, 0]))
    assert single.value == pytest.approx(0.75)
    assert (single.low, single.high) == (None, None)


def group(*responses: tuple[float, str]) -> dict:
    return {"responses": [{"score": score, "text": text} for score, text in responses]}


def test_battles_are_every_pair_of_a_prompts_responses():
    pairs = [(group((1, "ab"), (3, "a")), group((3, "abcd"))), (group((2, "")), group((1, "x"), (2, "xyz")))]
    found = battles(pairs)
    assert found.prompts.tolist() == [0, 0, 1, 1]
    assert found.outcomes.tolist() == [1, 0.5, 0, 0.5]
    assert found.lengths.tolist() == [2, 3, 1, 3]
    assert found.weights().tolist() == [0.5] * 4
    logits = battles(pairs, bradley_terry=True).outcomes
    assert logits == pytest.approx([1 / (1 + math.exp(-d)) for d in (2, 0, -1, 0)], abs=1e-15)


def test_a_mean_has_students_interval():
    values = [1.0, 4.0, 2.5, 7.0]
    found = mean(values)
    ends = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), *ends), abs=1e-12)
    assert mean([2.0]).low is None


# Of scikit-learn, whose options have other names now.
@pytest.mark.filterwarnings("ignore::FutureWarning:sklearn", "ignore::UserWarning:sklearn")
def test_the_rate_is_that_of_alpaca_evals_regression(tmp_path, monkeypatch):
    """Their regression without what ours leaves out, on annotations of the kind that their annotators give."""
    pytest.importorskip("alpaca_eval", reason="alpaca_eval is not installed: pip install alpaca-eval")
    import pandas
    from alpaca_eval.metrics import glm_winrate

    random = np.random.default_rng(7)
    lengths = lengths_of(300).astype(int)
    preferences = special.expit(THETA + PHI * effect(lengths) + random.normal(0, 0.8, 300))
    annotations = pandas.DataFrame(
        {
            "preference": 1 + preferences,  # 2 where the second output is better for certain
            "annotator": "a",
            "generator_1": "base",
            "generator_2": "trained",
            "output_1": ["x" * 600] * 300,
            "output_2": ["x" * (600 + length) for length in lengths],
        }
    )
    # The difficulties that they fetch; no term of the regression here reads them.
    difficulties = tmp_path / "df_gamed.csv"
    pandas.DataFrame({"model": "m", "index": range(300), "instruction_difficulty": 0.0}).to_csv(
        difficulties, index=False
    )
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: difficulties)
    theirs = glm_winrate.get_length_controlled_winrate(
        annotations,
        save_weights_dir=None,
        glm_info={
            "formula": glm_winrate.GLM_INFO["length_controlled_minimal"]["formula"],
            "regularize_to_baseline_lambda": None,
            "kwargs": {"n_splits": 0, "C": 1e8, "tol": 1e-10, "max_iter": 100_000},
        },
    )
    ours = fought(preferences, lengths)
    assert 100 * win_rate(ours).value == pytest.approx(theirs["win_rate"], abs=1e-8)
    assert 100 * at_equal_length(ours)[0].value == pytest.approx(
        theirs["length_controlled_winrate"], abs=1e-3
    )
    assert abs(theirs["length_controlled_winrate"] - theirs["win_rate"]) > 5
