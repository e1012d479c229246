"""A row's forward and backward never has the host wait for the GPU; a whole step does twice, at its end.

On a GPU torch itself raises at what waits (torch.cuda.set_sync_debug_mode), on a CPU tests.helpers.host_sync knows it
by name.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import Layout, build, gradients, logps, objective_named, step_for
from tests.gpu.conftest import Place, on_cpu, on_gpu
from tests.helpers.host_sync import watch
from tests.helpers.models import make_llama

SIZES = [2, 5, 3, 4]


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Fail at what waits within the block."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with watch() as found:
            yield
        assert found == []


def row_without_waits(folder: Path, wanted: Layout) -> float:
    """The step's rows, each forward and backward, after a pass to warm up. Returns the gradient's norm."""
    from mpo_megatron.training.step import objective_loss

    model = build(folder, SIZES, wanted)
    chunk = model.chunks[0]
    chunk.train()
    reference = logps(model)
    gradients(model, reference, "wmpo")
    step = step_for(model, "wmpo")
    loss_of = objective_loss(objective_named("wmpo"), reference)
    chunk.zero_grad_buffer()
    for row in step.rows:
        with no_waits(model.layout.device):
            loss, _, _ = loss_of(row, chunk(row))
            loss.backward()
    return float(sum(p.main_grad.double().square().sum() for p in chunk.parameters())) ** 0.5


def waits_of_a_step(folder: Path, wanted: Layout) -> int:
    """How often torch says that a step waits, optimizer left out."""
    model = build(folder, SIZES, wanted)
    reference = logps(model)
    gradients(model, reference, "wmpo")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        gradients(model, reference, "wmpo")
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(
        tmp_path_factory.mktemp("model"), num_hidden_layers=2, hidden_size=256, intermediate_size=512
    )


WITH = pytest.mark.parametrize(
    ("place", "kind", "backend"),
    [on_cpu("local", "sdpa"), *(on_gpu(kind, name) for kind in ("local", "te") for name in ("sdpa", "varlen", "te"))],
    indirect=["place"],
)  # fmt: skip


def layout_of(place: Place, kind: str, backend: str) -> Layout:
    if kind == "te":
        place.needs_library("transformer_engine")
    place.needs_attention(backend)
    options = {"transformer_engine": kind == "te", "attention_backend": backend}
    return Layout(precision=torch.bfloat16, options=options, accelerator=place.accelerator)


@WITH
def test_a_row_waits_for_nothing(kind: str, backend: str, place: Place, model: Path) -> None:
    layout = layout_of(place, kind, backend)
    (norm,) = place.ranks(1).run(row_without_waits, model, layout, timeout=280)
    assert norm > 0


@pytest.mark.parametrize(
    ("place", "kind", "backend"), [on_gpu("local", "varlen"), on_gpu("te", "te")], indirect=["place"]
)
def test_a_step_waits_for_its_metrics_and_megatrons_count(
    kind: str, backend: str, place: Place, model: Path, measured: Any
) -> None:
    """tests/distributed/test_host_sync.py names them; rows are copied while they are taken, which counts for none."""
    layout = layout_of(place, kind, backend)
    (found,) = place.ranks(1).run(waits_of_a_step, model, layout, timeout=280)
    measured("waits of a step", found, at_most=2)
