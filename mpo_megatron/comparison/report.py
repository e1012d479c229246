"""What a comparison found: on the screen, as CSV, as Markdown, and as a figure."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_megatron.comparison.results import FIGURES, Figure, Line

# Columns of the tables: key, title, format.
COLUMNS = (
    ("reward_margin_before", "reward margin before", "+.4f"),
    ("reward_margin_after", "after", "+.4f"),
    ("accuracy_before", "accuracy before", ".1%"),
    ("accuracy_after", "after", ".1%"),
    ("loss_after", "loss after", ".4g"),
    ("seconds_per_step", "seconds a step", ".2f"),
)
NOTES = (
    "Margin, accuracy and loss are of the held-out groups. Rewards, margins and losses are in each objective's own "
    "units: between objectives compare accuracies."
)
ERROR_NOTE = "± is one standard error over the seeds."


def cells(line: Line) -> list[str]:
    """A member's line: name, and a cell for each of COLUMNS."""
    if not line.figures:
        return [line.member, "failed", *[""] * (len(COLUMNS) - 1)]
    return [line.member, *(_cell(line.figures[key], fmt) for key, _, fmt in COLUMNS)]


def _cell(figure: Figure, fmt: str) -> str:
    error = "" if figure.error is None else f" ± {format(figure.error, fmt if fmt.endswith('%') else '.2g')}"
    return f"{format(figure.mean, fmt)}{error}"


def notes(lines: Sequence[Line]) -> list[str]:
    """The sentences below a table: units, and each run that failed, with its error."""
    several = any(figure.error is not None for line in lines for figure in line.figures.values())
    failed = [f"{run} failed: {error}" for line in lines for run, error in line.failed.items()]
    return [NOTES, *([ERROR_NOTE] if several else []), *failed]


def show(lines: Sequence[Line], title: str) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(["member", *(title for _, title, _ in COLUMNS)]):
        table.add_column(column, justify="right" if number else "left")
    for line in lines:
        table.add_row(*cells(line))
    # At least as wide as is readable, also where the output is no terminal.
    console = Console(file=sys.stdout)
    console = Console(file=sys.stdout, width=max(console.width, 132))
    console.print(table)
    for note in notes(lines):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def write_csv(lines: Sequence[Line], path: Path) -> None:
    """One row a member: mean and standard error of each figure, empty where there is none, and its errors."""
    names = [name for key in FIGURES for name in (key, f"{key}_error")]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["member", "seeds", *names, "failed"])
        writer.writeheader()
        for line in lines:
            row = {"member": line.member, "seeds": line.seeds, "failed": _joined(line)}
            for key, figure in line.figures.items():
                row |= {key: figure.mean, f"{key}_error": "" if figure.error is None else figure.error}
            writer.writerow(row)


def _joined(line: Line) -> str:
    return "; ".join(f"{run}: {error}" for run, error in line.failed.items())


def write_markdown(lines: Sequence[Line], title: str, path: Path) -> None:
    """The table and its notes."""
    rows = [
        ["member", *(title for _, title, _ in COLUMNS)],
        ["---", *("---:" for _ in COLUMNS)],
        *map(cells, lines),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    path.write_text("\n\n".join([f"# {title}", table, *notes(lines)]) + "\n", encoding="utf-8")


def plot(lines: Sequence[Line], title: str, path: Path) -> None:
    """A PNG: accuracy and reward margin of each member, before and after training, with standard errors.

    Margins are on an axis that is logarithmic away from 0: their units differ by orders of magnitude.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [line for line in lines if line.figures]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.6 + 0.28 * len(shown)), sharey=True, layout="constrained", squeeze=True
    )
    places = range(len(shown))
    for axis, key, label in zip(
        axes,
        ("accuracy", "reward_margin"),
        ("preference accuracy", "reward margin, in its own units"),
        strict=True,
    ):
        before, after = ([line.figures[f"{key}_{when}"] for line in shown] for when in ("before", "after"))
        axis.hlines(places, [one.mean for one in before], [one.mean for one in after], color="0.7", zorder=1)
        axis.scatter(
            [one.mean for one in before],
            places,
            facecolors="white",
            edgecolors="C0",
            label="before",
            zorder=3,
        )
        axis.errorbar(
            [one.mean for one in after], places, xerr=[one.error or 0.0 for one in after],
            fmt="o", capsize=3, color="C0", label="after", zorder=2,
        )  # fmt: skip
        axis.set_xlabel(label)
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(places, [line.member for line in shown])
    axes[0].invert_yaxis()
    axes[0].legend()
    axes[1].set_xscale("symlog", linthresh=0.01)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
