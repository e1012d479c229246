"""Ranks for the tests in this folder: `ranks(world_size).run(case, ...)`, see tests/helpers/ranks.py."""

from collections.abc import Callable, Iterator

import pytest

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts ranks, so that `-m "not distributed"` leaves it out."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.distributed)
