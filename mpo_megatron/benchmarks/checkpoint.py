"""Bytes that a rank needs beside what it has while a checkpoint is written and read, by form, on real CPU ranks.

Counted are the tensors that operations make, at the most that there are at a time, divided by the parameters that the
rank's model-parallel part has. Not counted: Python's own bytes (pickles, the files' buffers), and what a GPU takes in
addition, where each rank's share is copied to host memory before it is written; that share is a column of its own.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mpo_megatron.benchmarks.measure import peak_bytes
from mpo_megatron.benchmarks.models import small_config
from mpo_megatron.benchmarks.ranks import on_ranks
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.config import OptimConfig
from mpo_megatron.model.architecture import read_architecture
from mpo_megatron.model.provider import ModelOptions, build_model
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import ParallelLayout, initialize
from mpo_megatron.training import optimizer_state
from mpo_megatron.training.checkpoint import latest_checkpoint, load_checkpoint
from mpo_megatron.training.checkpoint_writer import CheckpointWriter
from mpo_megatron.training.data_parallel import DataParallel, wrap_data_parallel
from mpo_megatron.training.optimizer import build_optimizer, build_schedule

# Forms by their names in the table. Megatron gathers the last on all ranks unless it is told not to.
FORMS = {
    "dp_reshardable": optimizer_state.BUCKETS,
    "fully_reshardable": optimizer_state.WHOLE,
    "fully_reshardable, gathered on all ranks": optimizer_state.WHOLE,
}
ON_ALL_RANKS = list(FORMS)[2]
# Of a layer that no matrix of which is a large part of the model.
HIDDEN, VOCAB = 256, 1024


@dataclass(frozen=True)
class Found:
    """Of one rank, in bytes for each parameter of its model-parallel part.

    Attributes:
        saving: the most beside what there is, while a checkpoint is written.
        share: what the rank writes.
        loading: the most beside what there is, while it is read at the same layout.
        reshaped: the same at twice the tensor parallelism.
    """

    saving: float
    share: float
    loading: float
    reshaped: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    parser.add_argument("--layers", type=int, default=24)


def run(arguments: argparse.Namespace) -> Report:
    """Each form on two and on four data-parallel ranks."""
    layers = min(arguments.layers, 12) if arguments.quick else arguments.layers
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for form in FORMS:
        for ranks in (2, 4):
            found = _on_ranks(ranks, form, layers)
            most = {key: max(one[key] for one in found) for key in asdict(Found(0, 0, 0, 0))}
            # Of the others than rank 0, which may gather alone.
            others = max(one["saving"] for one in found[1:])
            rows.append([form, str(ranks), *(f"{value:.2f}" for value in (most["saving"], others)),
                         *(f"{most[key]:.2f}" for key in ("share", "loading", "reshaped"))])  # fmt: skip
            name = form.replace(", ", " ").replace(" ", "_")
            figures |= {f"{name}_dp{ranks}_{key}": value for key, value in most.items()}
    return Report(
        benchmark="checkpoint",
        columns=["form", "DP", "saving", "but for rank 0", "written", "loading", "at 2 x TP"],
        rows=rows,
        figures=figures,
        settings={"hidden": HIDDEN, "layers": layers, "vocab": VOCAB, "dtype": "bf16", "device": "cpu"},
        notes=[
            "bytes for each parameter of the rank's model-parallel part, beside weights (2), gradients (4) and "
            "optimizer (12 / DP); the most of all ranks",
            "written: what a rank writes at the most; in the background, and on a GPU always, it is first copied to "
            "host memory",
        ],
    )


def _on_ranks(ranks: int, form: str, layers: int) -> list[dict[str, float]]:
    """What each rank has found, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(ranks, "checkpoint", "measure", folder, form, layers)


def measure(path: str, form: str, layers: int) -> dict[str, float]:
    """Write and read checkpoints on this rank; all ranks call it.

    Args:
        path: of an empty folder, the same of all ranks.
        form: a key of FORMS.

    Returns:
        The fields of `Found`.
    """
    folder = Path(path)
    source = folder / "source"
    layout, state = _build(source, layers, tp=1)
    parameters = sum(parameter.numel() for parameter in state[0][0].parameters())
    writer = CheckpointWriter(folder / "saved", layout, FORMS[form])
    patched = patch.object(optimizer_state, "_MEMORY_EFFICIENT", "left out")

    def save() -> None:
        writer.start(1, *state, {}, source)
        writer.finish()

    saving = _peak(lambda: patched(save)() if form == ON_ALL_RANKS else save())
    saved = latest_checkpoint(folder / "saved")
    assert saved is not None
    share = sum(file.stat().st_size for file in saved.glob(f"__{layout.rank}_*.distcp"))
    loading = _peak(lambda: load_checkpoint(saved, *state, layout))
    parallel_state.destroy_model_parallel()
    layout, state = _build(source, layers, tp=2)
    part = sum(parameter.numel() for parameter in state[0][0].parameters())
    reshaped = _peak(lambda: load_checkpoint(saved, *state, layout))
    return asdict(Found(saving / parameters, share / parameters, loading / parameters, reshaped / part))


def _peak(call: Callable[[], Any]) -> int:
    dist.barrier()
    return peak_bytes(call)


def _build(source: Path, layers: int, tp: int) -> tuple[ParallelLayout, tuple[Any, Any, Any]]:
    """(layout, (chunks, optimizer, schedule)) of a bf16 model with the distributed optimizer, of random weights."""
    layout = initialize(choose_device("cpu"), tp=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    if layout.is_main and not source.exists():
        config = small_config(hidden=HIDDEN, layers=layers, vocab=VOCAB, max_positions=512)
        config.save_pretrained(source)
    dist.barrier()
    architecture = read_architecture(source)
    chunks = build_model(architecture, layout, ModelOptions(dtype=torch.bfloat16, sequence_parallel=tp > 1))
    chunks = wrap_data_parallel(chunks, DataParallel(distributed_optimizer=True))
    optim = OptimConfig()
    optimizer = build_optimizer(chunks, optim, 1.0, torch.bfloat16)
    return layout, (chunks, optimizer, build_schedule(optimizer, optim, 10))
