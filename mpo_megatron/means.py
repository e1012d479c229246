"""The mean of independent values, and what it may be off by."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Mean(NamedTuple):
    """A mean and its standard error, None of a single value."""

    mean: float
    error: float | None = None


def mean_and_error(values: Sequence[float]) -> Mean:
    """The mean of values that are independent: error = sqrt(sum((x - mean)^2) / (n - 1) / n)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.fmean(values), error)
