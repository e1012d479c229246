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


@pytest.fixture(scope="module")
def inputs_are_counted() -> Iterator[None]:
    """What the fuzz tests of a module have tried, by what came of it, is printed (pytest -s)."""
    from tests.helpers.fuzzing import TRIED

    TRIED.clear()
    yield
    print(f"\nfuzzed: {sum(TRIED.values()):,} inputs: {dict(TRIED)}")
