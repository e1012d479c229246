"""What the rounds came to: on the screen, as CSV, as Markdown, as a figure, and in samples."""

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_megatron.means import Mean
from mpo_megatron.rounds.figures import Example, Line

# Columns of the tables: title, name of the figure, format.
COLUMNS = (
    ("held-out score", "score", ".3f"),
    ("change", "change", "+.3f"),
    ("since round 0", "total", "+.3f"),
    ("KL to its start", "kl_start", ".2f"),
    ("KL to round 0", "kl_first", ".2f"),
    ("tokens", "tokens", ".1f"),
    ("ended", "finished", ".1%"),
    ("margin", "margin_after", "+.4f"),
    ("accuracy", "accuracy_after", ".1%"),
    ("trained on", "train_score", ".3f"),
    ("steps", "steps", "d"),
)
NOTES = (
    "± is one standard error over the prompts; changes are taken prompt by prompt, between samples of the same random "
    "numbers. KL: the mean over the held-out samples of log pi - log pi_ref, in nats a response. Ended: samples that "
    "the token limit did not cut. Margin and accuracy: of the training at its end, on the held-out samples of the "
    "policy that it started from. Trained on: the score of the samples that the round was trained with."
)


def cells(line: Line) -> list[str]:
    """A round's line: number, a cell for each of COLUMNS, prompts that rose and fell, and minutes."""
    moved = "" if line.better is None else f"{line.better} / {line.worse}"
    changed = "" if line.changed is None else f"{line.changed:.0%}"
    shown = [_cell(getattr(line, name), fmt) for _, name, fmt in COLUMNS]
    return [str(line.number), *shown, moved, changed, f"{line.seconds / 60:.1f}"]


def titles() -> list[str]:
    return ["round", *(title for title, _, _ in COLUMNS), "prompts up / down", "samples changed", "minutes"]


def _cell(value: Mean | float | None, fmt: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mean):
        return format(value, fmt)
    fmt_of_error = fmt.removeprefix("+")
    error = "" if value.error is None else f" ± {format(value.error, fmt_of_error)}"
    return f"{format(value.mean, fmt)}{error}"


def verdict(lines: Sequence[Line]) -> str:
    """Whether the score has risen, against its standard error; nothing after round 0 alone."""
    last = lines[-1]
    if last.total is None:
        return ""
    sentence = (
        f"From round 0 to round {last.number} the held-out score has changed by {_cell(last.total, '+.3f')}"
    )
    if not last.total.error:
        return f"{sentence}."
    return f"{sentence}: {last.total.mean / last.total.error:+.1f} standard errors."


def show(lines: Sequence[Line], title: str) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(titles()):
        table.add_column(column, justify="right" if number else "left")
    for line in lines:
        table.add_row(*cells(line))
    # At least as wide as is readable, also where the output is no terminal.
    console = Console(file=sys.stdout)
    console = Console(file=sys.stdout, width=max(console.width, 200))
    console.print(table)
    if sentence := verdict(lines):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def write_csv(lines: Sequence[Line], path: Path) -> None:
    """One row a round: each figure, and its standard error where it has one."""
    rows = []
    for line in lines:
        row: dict[str, object] = {}
        for name in (f.name for f in fields(line)):
            value = getattr(line, name)
            if isinstance(value, Mean):
                row |= {name: value.mean, f"{name}_error": "" if value.error is None else value.error}
            else:
                row[name] = "" if value is None else value
        rows.append(row)
    with _replacing(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    _replacing(path).replace(path)


def write_markdown(lines: Sequence[Line], title: str, path: Path) -> None:
    """The table and its notes."""
    rows = [titles(), ["---:"] * len(titles()), *map(cells, lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    parts = [f"# {title}", table, *filter(None, [verdict(lines)]), NOTES]
    _write(path, "\n\n".join(parts) + "\n")


def write_samples(examples: Sequence[Example], title: str, path: Path) -> None:
    """Each prompt, and what each round answers, with its score."""
    parts = [f"# {title}: a sample of each round", "The same random numbers in all rounds."]
    for example in examples:
        parts.append("## " + " ".join(example.prompt.split()))
        for number, (text, score) in enumerate(example.samples):
            quoted = "\n".join(f"> {line}".rstrip() for line in (text.strip() or "(nothing)").splitlines())
            parts.append(f"Round {number}, score {score:.2f}:\n\n{quoted}")
    _write(path, "\n\n".join(parts) + "\n")


def plot(lines: Sequence[Line], title: str, path: Path) -> None:
    """A PNG by round, with standard errors: score, divergence, length, margin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    panels = (
        ("score", (("score", "held-out"), ("train_score", "trained on"))),
        ("KL, nats a response", (("kl_start", "to its start"), ("kl_first", "to round 0"))),
        ("tokens a response", (("tokens", "held-out"),)),
        ("reward margin", (("margin_after", "after training"), ("margin_before", "before"))),
    )
    for axis, (label, series) in zip(axes.flat, panels, strict=True):
        for name, legend in series:
            points = [(line.number, value) for line in lines if (value := getattr(line, name)) is not None]
            values = [value if isinstance(value, Mean) else Mean(value) for _, value in points]
            axis.errorbar(
                [number for number, _ in points], [value.mean for value in values],
                yerr=[value.error or 0.0 for value in values], fmt="o-", capsize=3, label=legend,
            )  # fmt: skip
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axis.legend()
    for axis in axes[-1]:
        axis.set_xlabel("round")
    figure.suptitle(title)
    figure.savefig(_replacing(path), dpi=120, format="png")
    plt.close(figure)
    _replacing(path).replace(path)


def _replacing(path: Path) -> Path:
    """A name beside it, of this process: stages of a cluster may report at the same time."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _write(path: Path, text: str) -> None:
    _replacing(path).write_text(text, encoding="utf-8")
    _replacing(path).replace(path)
