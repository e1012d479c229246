"""The figures of a run, and of a member over its seeds."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mpo_megatron.comparison.plan import Run
from mpo_megatron.errors import UserError

# Of the held-out data, before and after training.
HELD_OUT = ("reward_margin", "accuracy", "loss")
FIGURES = (*(f"{name}_{when}" for name in HELD_OUT for when in ("before", "after")), "seconds_per_step")


@dataclass(frozen=True)
class Figure:
    """A mean over seeds and its standard error, None of a single one."""

    mean: float
    error: float | None = None


@dataclass(frozen=True)
class Line:
    """A member's line in the tables.

    Attributes:
        seeds: how many of its runs have ended well.
        figures: by the names in FIGURES; empty if none has.
        failed: what went wrong, by the name of the run.
    """

    member: str
    seeds: int
    figures: dict[str, Figure]
    failed: dict[str, str] = field(default_factory=dict)


def figures(path: Path) -> dict[str, float]:
    """The figures of one run, by the names in FIGURES, and its steps. Seconds are the median of the logged steps.

    Args:
        path: its metrics.jsonl.

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


def over_seeds(member: str, results: Mapping[Run, Mapping[str, float]], failed: Mapping[Run, str]) -> Line:
    """The line of a member from the figures of its runs."""
    own = [result for run, result in results.items() if run.member == member]
    found = {}
    for name in FIGURES if own else ():
        values = [result[name] for result in own]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[name] = Figure(statistics.fmean(values), error)
    return Line(
        member, len(own), found, {str(run): error for run, error in failed.items() if run.member == member}
    )
