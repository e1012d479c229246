"""Hyper-parameters: their types, for the signatures of objectives, and what a signature says of them."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mpo_megatron.errors import ConfigError
from mpo_megatron.finite import is_finite


@dataclass(frozen=True)
class Range:
    """The finite numbers from `least` (or above it, where `above` is set) to `most`."""

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: Any) -> bool:
        high_enough = value > self.least if self.above else value >= self.least
        return is_finite(value) and high_enough and value <= self.most

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.above else f"{self.least:g} or more"
        return least if math.isinf(self.most) else f"{least} and at most {self.most:g}"


Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
# The part of the pairs whose order is taken to be wrong.
LabelSmoothing = Annotated[float, Range(0, 0.5)]

_NAMES = {float: "a number", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class HyperParameter:
    """One keyword of an objective.

    Attributes:
        kind: float, int, bool or str.
        choices: the words that it may be; none unless it is a str.
        range: of a number; None: any.
        default: None if it has to be given.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    range: Range | None
    default: Any

    @property
    def required(self) -> bool:
        return self.default is None

    def check(self, value: Any) -> Any:
        """The value of `model.mpo.<name>`, of this kind.

        Raises:
            ConfigError: it is of another kind, out of range, or none of the choices.
        """
        given = f"model.mpo.{self.name}={str(value).lower() if isinstance(value, bool) else value}"
        if self.choices:
            if value not in self.choices:
                raise ConfigError(f"{given} is not known; choose one of {', '.join(self.choices)}")
            return value
        kinds = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise ConfigError(f"{given} must be {_NAMES[self.kind]}")
        if self.range is not None and value not in self.range:
            raise ConfigError(f"{given} must be {self.range}")
        return self.kind(value)


def hyper_parameters(function: Callable[..., Any]) -> dict[str, HyperParameter]:
    """The keyword-only parameters of an objective, by name, in the signature's order."""
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        kind, limits, choices = hints[name], None, ()
        if get_origin(kind) is Annotated:
            kind, limits = get_args(kind)
        if get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        default = None if parameter.default is parameter.empty else parameter.default
        found[name] = HyperParameter(name, kind, choices, limits, default)
    return found
