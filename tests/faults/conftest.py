"""The data and the ranks of the fault tests."""

from pathlib import Path

import pytest

from tests.faults.forks import Forks
from tests.helpers.main_job import write_data
from tests.helpers.models import make_llama
from tests.helpers.warm import WarmPython


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model, groups, and a folder for caches."""
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model": make_llama(folder / "model", max_position_embeddings=512, num_hidden_layers=2),
        "train": write_data(folder / "train.jsonl", 40, 0),
        "cache": folder / "cache",
    }


@pytest.fixture(scope="session")
def started(warm_python: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """What starts jobs in a moment."""
    return Forks(tmp_path_factory.mktemp("forks"), warm_python)
