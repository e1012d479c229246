"""Whether a value can be computed with."""

import sys


def is_finite(value: float) -> bool:
    """Whether a float can hold it: not NaN, not infinite, and no whole number beyond 1.8e308.

    For the last `math.isfinite` raises OverflowError, and a configuration or a line of JSON may hold one.
    """
    return abs(value) <= sys.float_info.max
