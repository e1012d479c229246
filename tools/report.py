"""Print what a run changed: implicit rewards on the validation data, and verified scores of samples before and after.

    python tools/report.py --experiment DIR --before before.scored.jsonl --after after.scored.jsonl

The scored files come from tools/score.py, for the same prompts. The last line printed is JSON with the figures.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation.pairs import matched, read_scored
from mpo_megatron.means import mean_and_error
from mpo_megatron.rollout.rewards import mean_score, summarise
from mpo_megatron.training.metrics_file import read_metrics


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print what a run changed, before against after.")
    parser.add_argument("--experiment", type=Path, required=True, help="the run's experiment folder")
    parser.add_argument("--before", type=Path, required=True, help="scored samples of the starting model")
    parser.add_argument("--after", type=Path, required=True, help="scored samples of the trained model")
    args = parser.parse_args(argv)
    try:
        figures = {
            **validation_figures(args.experiment / "metrics.jsonl"),
            **score_figures(args.before, args.after),
        }
    except (UserError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print_table(figures)
    print(json.dumps(figures))


def validation_figures(path: Path) -> dict[str, Any]:
    """Preference accuracy and reward margin of the first and last validation in a metrics.jsonl.

    Raises:
        UserError: the run has not validated before and after training.
    """
    found = [line for line in read_metrics(path) if line["split"] == "validation"]
    if len(found) < 2:
        raise UserError(
            f"{path} has {len(found)} validations; a report needs one before and one after training"
        )
    first, last = found[0], found[-1]
    return {
        "steps": last["step"],
        "accuracy_before": first["accuracy"],
        "accuracy_after": last["accuracy"],
        "reward_margin_before": first["reward_margin"],
        "reward_margin_after": last["reward_margin"],
    }


def score_figures(before_path: Path, after_path: Path) -> dict[str, Any]:
    """Mean score with its standard error over prompts, before and after, and the same of the difference by prompt.

    Raises:
        UserError: the two files are not of the same prompts, or have no scores.
    """
    before, after = read_scored(before_path), read_scored(after_path)
    gain, error = mean_and_error([mean_score(b) - mean_score(a) for a, b in matched(before, after)])
    first, last = summarise(before), summarise(after)
    return {
        "prompts": len(before),
        "score_before": first.mean_score,
        "score_before_error": first.standard_error,
        "score_after": last.mean_score,
        "score_after_error": last.standard_error,
        "score_gain": gain,
        "score_gain_error": error,
    }


def print_table(figures: dict[str, Any]) -> None:
    table = Table(title=f"after {figures['steps']} steps, on held-out prompts", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "preference accuracy", f"{figures['accuracy_before']:.1%}", f"{figures['accuracy_after']:.1%}"
    )
    table.add_row(
        "reward margin", f"{figures['reward_margin_before']:+.4f}", f"{figures['reward_margin_after']:+.4f}"
    )
    table.add_row(
        "mean verified score (0 to 10)",
        _with_error(figures["score_before"], figures["score_before_error"]),
        _with_error(figures["score_after"], figures["score_after_error"]),
    )
    console = Console(file=sys.stdout)
    console.print(table)
    gain = _with_error(figures["score_gain"], figures["score_gain_error"])
    console.print(
        f"gain in score, prompt by prompt: {gain} ({figures['prompts']} prompts; ± is one standard error)"
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()
