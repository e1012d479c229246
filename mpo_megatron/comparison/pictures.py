"""What a comparison found, drawn: all members, and along each axis of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.comparison.results import FIGURES, SCORES, Line

# Panels: key, label; of a key with `before` and `after`, both are drawn.
PANELS = (
    ("accuracy", "preference accuracy"),
    ("reward_margin", "reward margin, in its own units"),
    ("log_ratio_margin", "log-ratio margin, nats"),
    ("divergence", "divergence, nats a token"),
    ("score", "score of samples"),
    ("seconds_per_step", "seconds a step"),
)
SWEEP_PANELS = (
    ("accuracy_after", "preference accuracy"),
    ("log_ratio_margin", "log-ratio margin, nats"),
    ("divergence", "divergence, nats a token"),
    ("score_after", "score of samples"),
)


def plot(lines: Sequence[Line], title: str, path: Path) -> None:
    """A PNG: the figures of each member, before and after training, with standard errors.

    Reward margins are on an axis that is logarithmic away from 0: their units differ by orders of magnitude.
    """
    plt = _pyplot()
    shown = [line for line in lines if line.figures]
    sampled = any(key in line.figures for line in shown for key in SCORES)
    panels = [panel for panel in PANELS if panel[0] != "score" or sampled]
    figure, axes = plt.subplots(
        2, 3, figsize=(13, 3 + 0.5 * len(shown)), sharey=True, layout="constrained", squeeze=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (key, label) in zip(axes.flat, panels, strict=False):
        ends = [f"{key}_before", f"{key}_after"] if f"{key}_after" in (*FIGURES, *SCORES) else [key]
        # A member whose models were not sampled has no score.
        places = [place for place, line in enumerate(shown) if ends[-1] in line.figures]
        before, after = ([shown[place].figures[end] for place in places] for end in (ends[0], ends[-1]))
        if len(ends) > 1:
            start = [one.mean for one in before]
            axis.hlines(places, start, [one.mean for one in after], color="0.7", zorder=1)
            axis.scatter(start, places, facecolors="white", edgecolors="C0", label="before", zorder=3)
        axis.errorbar(
            [one.mean for one in after], places, xerr=[one.error or 0.0 for one in after],
            fmt="o", capsize=3, color="C0", label="after", zorder=2,
        )  # fmt: skip
        axis.set_xlabel(label)
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
        if key == "reward_margin":
            axis.set_xscale("symlog", linthresh=0.01)
        else:
            axis.locator_params(axis="x", nbins=5)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(shown)), [line.member for line in shown])
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_sweep(
    lines: Mapping[str, Line],
    axis_name: str,
    curves: Mapping[str, Sequence[tuple[Any, str]]],
    title: str,
    path: Path,
) -> None:
    """A PNG: figures after training against the swept value, a curve for each member, with standard errors.

    Args:
        lines: by member.
        curves: by what each shows, its (value, member). Values are set side by side, in the file's order.
    """
    plt = _pyplot()
    values = list(dict.fromkeys(value for curve in curves.values() for value, _ in curve))
    panels = [panel for panel in SWEEP_PANELS if any(panel[0] in line.figures for line in lines.values())]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            # Side by side, so that their errors can be told apart.
            shift = 0.06 * (number - (len(curves) - 1) / 2)
            there = [(values.index(value) + shift, lines[member].figures[key])
                     for value, member in curve if member in lines and key in lines[member].figures]  # fmt: skip
            axis.errorbar(
                [x for x, _ in there], [of.mean for _, of in there], yerr=[of.error or 0.0 for _, of in there],
                fmt="o-", capsize=3, label=name,
            )  # fmt: skip
        axis.set_xlabel(axis_name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.set_xticks(range(len(values)), [str(value) for value in values])
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
