"""What a comparison found: tables on the screen, as CSV and as Markdown."""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_megatron.comparison.paired import Difference
from mpo_megatron.comparison.results import FIGURES, SCORES, Line
from mpo_megatron.means import Mean

# Columns of the table: key, title, format.
COLUMNS = (
    ("reward_margin_before", "reward margin before", "+.4f"),
    ("reward_margin_after", "after", "+.4f"),
    ("accuracy_before", "accuracy before", ".1%"),
    ("accuracy_after", "after", ".1%"),
    ("log_ratio_margin", "log-ratio margin, nats", "+.3f"),
    ("divergence", "divergence, nats a token", "+.4f"),
    ("score_before", "score of samples before", ".3f"),
    ("score_after", "after", ".3f"),
    ("score_gain", "gain", "+.3f"),
    ("loss_after", "loss after", ".4g"),
    ("seconds_per_step", "seconds a step", ".2f"),
)
# Of the differences.
PAIRED_COLUMNS = (
    ("accuracy", "log-ratio accuracy", "+.1%"),
    ("margin", "log-ratio margin, nats", "+.3f"),
    ("score", "score of samples", "+.3f"),
)
NOTES = (
    "Margin, accuracy, divergence and loss are of the held-out groups. Rewards, margins and losses are in each "
    "objective's own units: between objectives compare accuracies and log-ratios. Log-ratios are of the trained to the "
    "starting model; divergence is the log-prob that held-out responses have lost, of samples of the starting model an "
    "estimate of KL(starting || trained)."
)
ERROR_NOTE = "± is one standard error over the seeds."
SCORE_NOTE = "± of scores is one standard error over the prompts; the gain is taken prompt by prompt."
PAIRED_NOTE = (
    "Differences are taken group by group (of samples: prompt by prompt) and seed by seed. ± one standard error over "
    "groups / over seeds: what other held-out groups, and what other seeds, would change."
)


@dataclass(frozen=True)
class Pair:
    """A member against the baseline: by the names in PAIRED_COLUMNS, where both have it."""

    member: str
    baseline: str
    differences: dict[str, Difference]


@dataclass(frozen=True)
class Grid:
    """A table as it is shown."""

    title: str
    rows: list[list[str]]  # the first has the titles of the columns
    notes: list[str]


def table(lines: Sequence[Line], title: str, left: Sequence[str] = ()) -> Grid:
    """The figures of all members.

    Args:
        left: runs that are not finished.
    """
    shown = [
        column
        for column in COLUMNS
        if column[0] not in SCORES or any(column[0] in line.figures for line in lines)
    ]
    rows = [["member", "seeds", *(title for _, title, _ in shown)]]
    for line in lines:
        cells = [_cell(line.figures.get(key), fmt) for key, _, fmt in shown] if line.figures else ["failed"]
        rows.append([line.member, str(line.seeds), *cells, *[""] * (len(shown) - len(cells))])
    unfinished = [f"Not finished: {'; '.join(left)}."] if left else []
    return Grid(title, rows, [*_notes(lines), *unfinished])


def _cell(figure: Mean | None, fmt: str) -> str:
    if figure is None:
        return ""
    return f"{format(figure.mean, fmt)}{'' if figure.error is None else f' ± {_error(figure.error, fmt)}'}"


def _error(error: float | None, fmt: str) -> str:
    if error is None:
        return "–"
    return format(error, fmt.lstrip("+")) if fmt.endswith("%") else format(error, ".2g")


def _notes(lines: Sequence[Line]) -> list[str]:
    """The sentences below a table: units, and each run that failed, with its error."""
    several = any(line.figures[key].error is not None for line in lines if line.figures for key in FIGURES)
    sampled = any(key in line.figures for line in lines for key in SCORES)
    failed = [f"{run} failed: {error}" for line in lines for run, error in line.failed.items()]
    return [NOTES, *([ERROR_NOTE] if several else []), *([SCORE_NOTE] if sampled else []), *failed]


def paired_table(pairs: Sequence[Pair]) -> Grid:
    """The differences of all members to their baseline."""
    shown = [column for column in PAIRED_COLUMNS if any(column[0] in pair.differences for pair in pairs)]
    rows = [["member", "less", "groups", "seeds", *(title for _, title, _ in shown)]]
    for pair in pairs:
        counts = pair.differences.get("margin")
        rows.append(
            [
                pair.member,
                pair.baseline,
                str(counts.groups) if counts else "",
                str(counts.seeds) if counts else "",
                *(_paired_cell(pair.differences.get(key), fmt) for key, _, fmt in shown),
            ]
        )
    return Grid("differences to the baseline", rows, [PAIRED_NOTE])


def _paired_cell(of: Difference | None, fmt: str) -> str:
    if of is None:
        return ""
    return f"{format(of.mean, fmt)} ± {_error(of.over_groups, fmt)} / {_error(of.over_seeds, fmt)}"


def show(grid: Grid) -> None:
    """Print a table."""
    shown = Table(title=grid.title, title_justify="left")
    titles, *rows = grid.rows
    for number, title in enumerate(titles):
        shown.add_column(title, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        shown.add_row(*row)
    # At least as wide as is readable, also where the output is no terminal.
    console = Console(file=sys.stdout)
    console = Console(file=sys.stdout, width=max(console.width, 170))
    console.print(shown)
    for note in grid.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def write_markdown(grids: Sequence[Grid], path: Path) -> None:
    """Tables and their notes, one below the other."""
    path.write_text("\n\n".join(map(_markdown, grids)) + "\n", encoding="utf-8")


def _markdown(grid: Grid) -> str:
    titles, *rows = grid.rows
    rule = ["---", *("---:" for _ in titles[1:])]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))
    return "\n\n".join([f"# {grid.title}", lines, *grid.notes])


def write_csv(lines: Sequence[Line], path: Path) -> None:
    """One row a member: mean and standard error of each figure, empty where there is none, and its errors."""
    names = [name for key in (*FIGURES, *SCORES) for name in (key, f"{key}_error")]
    rows = []
    for line in lines:
        row: dict[str, object] = {"member": line.member, "seeds": line.seeds, "failed": _joined(line)}
        for key, figure in line.figures.items():
            row |= {key: figure.mean, f"{key}_error": figure.error}
        rows.append(row)
    _write(["member", "seeds", *names, "failed"], rows, path)


def write_paired_csv(pairs: Sequence[Pair], path: Path) -> None:
    """One row for each difference."""
    rows: list[dict[str, object]] = [
        {"member": pair.member, "baseline": pair.baseline, "of": key, **asdict(of), "error": of.error}
        for pair in pairs
        for key, of in pair.differences.items()
    ]
    names = ["member", "baseline", "of", "mean", "over_groups", "over_seeds", "error", "groups", "seeds"]
    _write(names, rows, path)


def _write(names: Sequence[str], rows: Sequence[Mapping[str, object]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _joined(line: Line) -> str:
    return "; ".join(f"{run}: {error}" for run, error in line.failed.items())
