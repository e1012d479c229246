"""Ranks for the tests in this folder: `ranks(world_size).run(case, ...)`, see tests/helpers/ranks.py."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import transformer_engine
from tests.helpers.main_job import make_inputs
from tests.helpers.ranks import RankPool, RankProcesses


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """A function from a world size to that many ranks, with Megatron-core sent to the CPU."""
    processes = RankProcesses(
        setup="tests.distributed.rank_setup:set_up",
        teardown="megatron.core.parallel_state:destroy_model_parallel",
    )
    yield lambda world_size: RankPool(world_size, processes)
    processes.close()


@pytest.fixture(scope="session")
def te_ranks() -> Iterator[Callable[[int], RankPool]]:
    """The same in processes that have Transformer Engine's layers; see tests.helpers.transformer_engine."""
    if not transformer_engine.is_there():
        pytest.skip(
            f"Transformer Engine's wheel is not in {transformer_engine.FOLDER}; tools/setup_venv.sh unpacks it"
        )
    processes = RankProcesses(
        setup="tests.helpers.transformer_engine:set_up",
        teardown="tests.helpers.transformer_engine:tear_down",
    )
    yield lambda world_size: RankPool(world_size, processes)
    processes.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model and data for the main job."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts ranks, so that `-m "not distributed"` leaves it out."""
    for item in items:
        if {"ranks", "te_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.distributed)
