"""Where these tests run, and what they measure.

Each body is a function that the ranks run, given where: on a CPU in small, so that the body is known to be right, and
on GPUs (marked `gpu`), as many as the layout needs. A test that cannot run says what is missing. What a test measures
is a property of it in the report of junit, from which tools/gpu_suite.py makes its table.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.gpu.ranks import GPU_ENVIRONMENT, attention_problem, fp8_problem, problem_of
from tests.helpers.ranks import RankPool, RankProcesses


@dataclass(frozen=True)
class Place:
    """CPU ranks, or GPUs.

    Attributes:
        accelerator: `cpu` or `gpu`, as in `trainer.accelerator`.
        gpus: of this machine.
    """

    accelerator: str
    gpus: int
    processes: RankProcesses

    @property
    def is_gpu(self) -> bool:
        return self.accelerator == "gpu"

    def ranks(self, count: int) -> RankPool:
        """So many ranks; a test that needs more GPUs than there are is skipped."""
        if self.is_gpu and count > self.gpus:
            pytest.skip(f"needs {count} GPUs, and here {'is' if self.gpus == 1 else 'are'} {self.gpus}")
        return RankPool(count, self.processes)

    def needs_library(self, name: str) -> None:
        """Skip the test unless this library (a function of `runtime.capabilities`) can be used here."""
        if not self.is_gpu and name == "transformer_engine":
            pytest.skip("Transformer Engine needs a GPU; tests/distributed runs its Python on CPU ranks")
        self._skip_if(self.ranks(1).run(problem_of, name)[0])

    def needs_attention(self, backend: str) -> None:
        """Skip the test unless this attention backend can run here in bf16."""
        problem = self.ranks(1).run(attention_problem, backend, self.accelerator)[0]
        self._skip_if(problem and f"model.attention_backend={backend}: {problem}")

    def needs_recipe(self, recipe: str) -> None:
        """Skip the test unless this GPU runs this FP8 recipe."""
        self._skip_if(self.ranks(1).run(fp8_problem, recipe)[0])

    @staticmethod
    def _skip_if(problem: str | None) -> None:
        if problem is not None:
            pytest.skip(problem)


@pytest.fixture(scope="session")
def cpu() -> Iterator[Place]:
    """CPU ranks, also where there are GPUs."""
    processes = RankProcesses(
        setup="tests.gpu.ranks:set_up_cpu",
        teardown="megatron.core.parallel_state:destroy_model_parallel",
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    yield Place("cpu", 0, processes)
    processes.close()


@pytest.fixture(scope="session")
def gpu() -> Iterator[Place]:
    """A rank on each GPU that a test asks for."""
    count = torch.cuda.device_count()
    if not count:
        pytest.skip("torch finds no GPU on this machine")
    processes = RankProcesses(
        teardown="tests.gpu.ranks:tear_down_gpu", gpus=True, environment=GPU_ENVIRONMENT
    )
    yield Place("gpu", count, processes)
    processes.close()


def on_cpu(*values: Any) -> Any:
    """Parameters of a test that runs on CPU ranks; the first is `place`, indirect."""
    return pytest.param("cpu", *values)


def on_gpu(*values: Any) -> Any:
    """The same on GPUs."""
    return pytest.param("gpu", *values, marks=pytest.mark.gpu)


@pytest.fixture(scope="session", params=[on_cpu(), on_gpu()])
def place(request: pytest.FixtureRequest) -> Place:
    """Where the test's body runs: on CPU ranks and on GPUs, if the test does not say."""
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Note a deviation beside what is allowed, and check it: `measured("gradient of keys", 2e-3, at_most=1e-2)`."""

    def note(what: str, value: float, at_most: float | None = None) -> None:
        record_property("measured", json.dumps({"what": what, "value": value, "at_most": at_most}))
        if at_most is not None:
            assert value <= at_most, f"{what}: {value:.3g} is more than {at_most:.3g}"  # NaN fails too

    return note


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They all start ranks, so that `-m "not distributed"` leaves them out. Where they run is told junit's report."""
    for item in items:
        if {"place", "cpu", "gpu"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.distributed)
            item.user_properties.append(("on", "gpu" if item.get_closest_marker("gpu") else "cpu"))
