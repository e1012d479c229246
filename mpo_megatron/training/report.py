"""What a person sees: progress bars, the table at the end, and the picture of the run."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# Rows of the table at the end: key in metrics.jsonl, label, format.
_TABLE = (
    ("loss", "loss", ".4f"),
    ("reward_margin", "reward margin", "+.4f"),
    ("accuracy", "preference accuracy", ".1%"),
    ("preferred_reward", "reward, preferred", "+.4f"),
    ("dispreferred_reward", "reward, dispreferred", "+.4f"),
)


def progress(title: str, unit: str, shown: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar around an iterable, on the rank that shows one."""
    return lambda items: tqdm(
        items, desc=title, unit=unit, disable=not shown, dynamic_ncols=True, file=sys.stdout
    )


class TrainingBar:
    """The bar of the training loop: loss, reward margin, accuracy, groups/s, tokens/s, MFU, peak memory, time left."""

    def __init__(self, total_steps: int, done: int, shown: bool) -> None:
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            desc="training",
            unit="step",
            disable=not shown,
            dynamic_ncols=True,
            file=sys.stdout,
        )

    def advance(self, values: dict[str, float] | None) -> None:
        """One step further, with its metrics; None: it was left out."""
        if values is None:
            self._bar.update()
            return
        mfu = f", MFU {values['mfu']:.0%}" if "mfu" in values else ""
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, margin {values['reward_margin']:+.3f}, accuracy {values['accuracy']:.2f}, "
            f"{values['groups_per_second']:.2f} groups/s, {values['tokens_per_second']:.0f} tokens/s, "
            f"{values['tflops']:.3g} TFLOP/s a rank{mfu}, {values['peak_memory'] / 2**30:.3g} GiB",
            refresh=False,
        )
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def say(text: str) -> None:
    """A line to the screen that leaves a running bar in order."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def before_after(before: dict[str, float], after: dict[str, float], title: str) -> None:
    """Print the table of validation metrics before and after training."""
    table = Table(title=title, title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for key, label, fmt in _TABLE:
        table.add_row(label, format(before[key], fmt), format(after[key], fmt))
    Console(file=sys.stdout).print(table)


def plot_run(history: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG of reward margin and preference accuracy over the steps, in training and in validation.

    Args:
        history: the lines of metrics.jsonl.
        path: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, key, label in zip(
        axes, ("reward_margin", "accuracy"), ("reward margin", "preference accuracy"), strict=True
    ):
        for split, style in (
            ("train", {"alpha": 0.5, "linewidth": 1}),
            ("validation", {"marker": "o", "linewidth": 2}),
        ):
            lines = [line for line in history if line["split"] == split]
            if lines:
                axis.plot(
                    [line["step"] for line in lines], [line[key] for line in lines], label=split, **style
                )
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[1].set_ylim(0, 1)
    figure.savefig(path, dpi=120)
    plt.close(figure)
