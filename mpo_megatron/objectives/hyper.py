"""Types of hyper-parameters, for the signatures of objectives."""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """The finite numbers from `least` (or above it, where `above` is set) to `most`."""

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        high_enough = value > self.least if self.above else value >= self.least
        return math.isfinite(value) and high_enough and value <= self.most

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.above else f"{self.least:g} or more"
        return least if math.isinf(self.most) else f"{least} and at most {self.most:g}"


Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
# The part of the pairs whose order is taken to be wrong.
LabelSmoothing = Annotated[float, Range(0, 0.5)]
