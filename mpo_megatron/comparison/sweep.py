"""The grid of a comparison: every combination of the values of some keys.

    sweep:
      beta: [0.01, 0.1, 1]                        # a key of model.mpo, or any other of the job, and its values
      model.data.score_noise: [0, 0.5, 1, 2]
      sets:                                       # or a name of your own: for each value a mapping, as of a member
        2: {model.data.keep_best: 1, model.data.keep_worst: 1}
        4: {model.data.keep_best: 2, model.data.keep_worst: 2}

Each member is run at every point of the grid, as MEMBER-NAME_VALUE.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpo_megatron.comparison.overrides import MPO, as_typed
from mpo_megatron.errors import UserError
from mpo_megatron.overrides import full_key


@dataclass(frozen=True)
class Point:
    """A point of the grid: what it is called, its value on each axis, and the overrides that make it."""

    suffix: str
    values: dict[str, Any]
    overrides: list[str]


def points(section: Any) -> list[Point]:
    """The points of a grid, the last axis fastest; of no grid one, without a name.

    Raises:
        UserError: the section is not as above.
    """
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise UserError(f"sweep must give values by key, such as {{beta: [0.01, 0.1]}}, not {section}")
    axes = {
        name: _axis(key, values) for (key, values), name in zip(section.items(), _names(section), strict=True)
    }
    found = [
        _point(dict(zip(axes, combination, strict=True)), axes)
        for combination in itertools.product(*axes.values())
    ]
    suffixes = [point.suffix for point in found]
    for suffix in suffixes:
        if suffixes.count(suffix) > 1:
            raise UserError(
                f"sweep has two points of the name {suffix[1:]}; give values that differ in letters or digits"
            )
    return found


def _names(section: Mapping[Any, Any]) -> list[str]:
    """The last part of each key, where it is no other's; otherwise the whole key."""
    lasts = [str(key).rpartition(".")[2] for key in section]
    return [last if lasts.count(last) == 1 else str(key) for key, last in zip(section, lasts, strict=True)]


def _axis(key: Any, values: Any) -> dict[Any, list[str]]:
    """The overrides of each value."""
    where = f"sweep.{key}"
    if isinstance(values, dict) and values:
        return {value: as_typed(of, f"{where}.{value}", prefix=MPO) for value, of in values.items()}
    if not isinstance(values, list) or not values or any(isinstance(value, dict | list) for value in values):
        raise UserError(
            f"{where} must be a list of values, such as [0.01, 0.1], or give overrides for each value, not {values}"
        )
    if any(values.count(value) > 1 for value in values):
        raise UserError(f"{where}={values} has one of them twice; remove it")
    return {value: as_typed({full_key(key, MPO): value}, where) for value in values}


def _point(values: dict[str, Any], axes: Mapping[str, Mapping[Any, list[str]]]) -> Point:
    suffix = "".join(f"-{name}_{value}" for name, value in values.items())
    overrides = [override for name, value in values.items() for override in axes[name][value]]
    return Point(re.sub(r"[^\w.-]", "_", suffix), values, overrides)


def lines_of(
    members: Mapping[str, tuple[str, Mapping[str, Any]]], axis: str
) -> Iterator[tuple[str, list[tuple[Any, str]]]]:
    """The lines of a picture with an axis of the grid as x: (what a line shows, [(x, member)] in the file's order).

    Args:
        members: for each name the member before the sweep, and its values on all axes.
    """
    lines: dict[str, list[tuple[Any, str]]] = {}
    for name, (base, values) in members.items():
        if axis in values:
            others = [f"{other} {value}" for other, value in values.items() if other != axis]
            lines.setdefault(", ".join([base, *others]), []).append((values[axis], name))
    yield from lines.items()
