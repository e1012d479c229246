"""The figures of a run, and of a member over its seeds."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mpo_megatron.comparison.held_out import read_held_out
from mpo_megatron.comparison.plan import Run
from mpo_megatron.errors import UserError
from mpo_megatron.means import Mean, mean_and_error

# Of the held-out data, before and after training.
HELD_OUT = ("reward_margin", "accuracy", "loss")
# Of a run. `held_out` says what log-ratios and divergence are.
FIGURES = (
    *(f"{name}_{when}" for name in HELD_OUT for when in ("before", "after")),
    "log_ratio_margin",
    "divergence",
    "seconds_per_step",
)
# Of a run's samples.
SCORES = ("score_before", "score_after", "score_gain")


@dataclass(frozen=True)
class Line:
    """A member's line in the tables.

    Attributes:
        seeds: how many of its runs have ended well.
        figures: by the names in FIGURES, over seeds; empty if none has. By those in SCORES, over prompts, if its models
            were sampled.
        failed: what went wrong, by the name of the run.
    """

    member: str
    seeds: int
    figures: dict[str, Mean]
    failed: dict[str, str] = field(default_factory=dict)


def figures(folder: Path) -> dict[str, float]:
    """The figures of one run, by the names in FIGURES, and its steps.

    Args:
        folder: of its experiment.

    Raises:
        UserError: it has no two validations.
    """
    found = of_metrics(folder / "metrics.jsonl")
    groups = read_held_out(folder)
    return found | {"log_ratio_margin": float(groups.margin.mean()), "divergence": groups.divergence}


def of_metrics(path: Path) -> dict[str, float]:
    """Of HELD_OUT before and after training, the steps, and the median seconds of those that were logged.

    Args:
        path: a run's metrics.jsonl.

    Raises:
        UserError: it has no two validations.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    validations = [line for line in lines if line["split"] == "validation"]
    if len(validations) < 2:
        raise UserError(
            f"{path} has {len(validations)} validations, and a comparison needs one before and one after training; "
            "give model.data.validation"
        )
    before, after = validations[0], validations[-1]
    found = {
        f"{name}_{when}": line[name]
        for name in HELD_OUT
        for when, line in (("before", before), ("after", after))
    }
    seconds = statistics.median(line["seconds"] for line in lines if line["split"] == "train")
    return {**found, "seconds_per_step": seconds, "steps": after["step"]}


def over_seeds(
    member: str,
    results: Mapping[Run, Mapping[str, float]],
    failed: Mapping[Run, str],
    start: Mapping[str, float] | None = None,
    scores: Mapping[Run, Mapping[str, float]] | None = None,
) -> Line:
    """The line of a member from the figures of its runs.

    Args:
        start: mean score of the starting model's samples, by prompt.
        scores: the same of each run that was sampled.
    """
    own = [result for run, result in results.items() if run.member == member]
    found = {name: mean_and_error([result[name] for result in own]) for name in FIGURES} if own else {}
    sampled = [of for run, of in (scores or {}).items() if run.member == member]
    if own and sampled and start is not None:
        after = {name: statistics.fmean(of[name] for of in sampled) for name in start}
        gains = [after[name] - start[name] for name in start]
        for name, values in zip(SCORES, (list(start.values()), list(after.values()), gains), strict=True):
            found[name] = mean_and_error(values)
    return Line(
        member, len(own), found, {str(run): error for run, error in failed.items() if run.member == member}
    )
