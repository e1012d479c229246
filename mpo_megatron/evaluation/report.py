"""Two models' scored answers to held-out prompts in figures: reward, length, and the trained model's win rate."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpo_megatron.evaluation.pairs import Pair
from mpo_megatron.evaluation.win_rate import (
    Estimate,
    LengthControlled,
    battles,
    length_controlled,
    mean,
    win_rate,
)
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.rewards import mean_score, summarise


@dataclass(frozen=True)
class Figure:
    """Of each model the mean over prompts, and the mean of the difference prompt by prompt, trained minus base."""

    base: Estimate
    trained: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Report:
    """Attributes:
    characters: of a response.
    base_finished_share, trained_finished_share: of responses, those that ended by themselves.
    """

    prompts: int
    reward: Figure
    characters: Figure
    base_finished_share: float
    trained_finished_share: float
    win_rate: Estimate
    length_controlled: LengthControlled


def report(pairs: Sequence[Pair], *, bradley_terry: bool = False) -> Report:
    """The figures of scored groups, at least one pair; `bradley_terry` as for `win_rate.battles`.

    Intervals of means are Student's: a mean over some dozens of prompts or more is nearly normal whatever the scores
    are, the paired difference takes each prompt's difficulty out, and the same files give the same figures, which a
    bootstrap would draw.
    """
    fought = battles(pairs, bradley_terry=bradley_terry)
    return Report(
        prompts=len(pairs),
        reward=_figure(pairs, mean_score),
        characters=_figure(pairs, _characters),
        base_finished_share=summarise(base for base, _ in pairs).finished_share,
        trained_finished_share=summarise(trained for _, trained in pairs).finished_share,
        win_rate=win_rate(fought),
        length_controlled=length_controlled(fought),
    )


def _figure(pairs: Sequence[Pair], of: Callable[[Record], float]) -> Figure:
    both = [(of(base), of(trained)) for base, trained in pairs]
    return Figure(
        base=mean([base for base, _ in both]),
        trained=mean([trained for _, trained in both]),
        difference=mean([trained - base for base, trained in both]),
    )


def _characters(group: Record) -> float:
    return statistics.fmean(len(response["text"]) for response in group["responses"])
