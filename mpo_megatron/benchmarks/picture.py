"""The three results that matter most to a user, in one picture: against TRL, by the size of groups, and the head."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]

_TRL = {
    "speedup": "TRL, its defaults",
    "speedup_precomputed": "… reference precomputed",
    "speedup_fast": "TRL, made fast",
    "speedup_precomputed_fast": "… reference precomputed",
}
_OURS, _THEIRS = "tab:blue", "tab:gray"


def draw(found: Mapping[str, Figures], path: Path) -> bool:
    """Draw what there is of it.

    Args:
        found: the figures of each benchmark, as its line of JSON has them, by its name.
        path: of the picture; its ending says its format.

    Returns:
        Whether there was anything to draw; without it no file is written.
    """
    panels: dict[str, Callable[[Any, Figures], None]] = {"trl": _trl, "unshared": _unshared, "head": _head}
    there = [name for name in panels if name in found]
    if not there:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(there), figsize=(4 * len(there), 3), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], there, strict=True):
        panels[name](axis, found[name])
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _trl(axis: Any, figures: Figures) -> None:
    """Processor time of a group, to ours."""
    names = ["mpo_megatron", *_TRL.values()]
    values = [1.0, *(figures[name] for name in _TRL)]
    _bars(axis, names, values, [_OURS] + [_THEIRS] * len(_TRL), "{:.1f} x")
    axis.set_title(f"Time to train on a group of {figures['settings']['responses']}", fontsize=10)


def _unshared(axis: Any, figures: Figures) -> None:
    """Groups per second over those of the same rows with a prompt for each response, by responses of a group."""
    sizes = sorted(int(name.removeprefix("gain_")) for name in figures if name.startswith("gain_"))
    ratios = [figures[f"flop_ratio_{n}"] for n in sizes]
    axis.plot(sizes, ratios, "--", color=_THEIRS, label="by FLOPs")
    axis.plot(sizes, [figures[f"gain_{n}"] for n in sizes], "o-", color=_OURS, label="measured")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.set_xlabel("responses of a group")
    axis.set_ylim(bottom=1)
    axis.legend(fontsize=8)
    settings = figures["settings"]
    axis.set_title(
        f"Gain of a shared prompt ({settings['prompt']} + {settings['response']} tokens)", fontsize=10
    )


def _head(axis: Any, figures: Figures) -> None:
    """Mebibytes at the head, beside whole logits."""
    names = ["mpo_megatron, peak", "whole logits, peak", "mpo_megatron, kept", "whole logits, kept"]
    keys = ("peak_bytes", "eager_peak_bytes", "kept_bytes", "eager_kept_bytes")
    values = [figures[key] / 2**20 for key in keys]
    _bars(axis, names, values, [_OURS, _THEIRS] * 2, "{:.0f} MiB")
    axis.set_title(f"Head, N x V x H = {figures['settings']['case']}", fontsize=10)


def _bars(axis: Any, names: list[str], values: list[float], colours: list[str], form: str) -> None:
    places = range(len(names))
    bars = axis.barh(places, values, color=colours)
    axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(right=max(values) * 1.25)
    axis.set_xticks([])
