"""What tests of several folders start programs with."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import warm


@pytest.fixture(scope="session")
def warm_python() -> Iterator[warm.WarmPython]:
    """`python` and `torchrun` that start in a moment, see tests/helpers/warm.py."""
    # The path of a socket has an upper limit, which pytest's folders may come near.
    with tempfile.TemporaryDirectory(prefix="warm-") as folder, warm.warm_python(Path(folder)) as found:
        yield found
