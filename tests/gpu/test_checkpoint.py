"""Saving and loading a checkpoint of a 1B model: what it adds to a GPU's memory, and that training goes on from it.

In bf16 with the distributed optimizer, on as many data-parallel GPUs as there are: whatever is gathered for a
checkpoint is gathered on each of them.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.conftest import Place, on_cpu, on_gpu

GIB = 2**30
# Bytes a parameter beyond what training holds. Written: pieces of a bucket. Read: weights and optimizer state again
# (2 + 12), on the way to their places.
SAVE, LOAD = 0.5, 16.0


def config_of(size: str) -> Any:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 256,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if size == "1B":  # Llama 3.2's
        sizes = {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "vocab_size": 128_256,
        }
        sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=True)


def save_and_load(accelerator: str, size: str, folder: Path, source: Path) -> dict[str, float]:
    """Train two steps, save between them, go back to the checkpoint, and train the second step again.

    Returns:
        `parameters`; `save` and `load`, bytes that they add to the most of a GPU's tensors (0 on a CPU); `loss again`
        and `weights again`, how far the second step is from the first time; seconds of both.
    """
    from mpo_megatron.benchmarks.job import Job, random_groups
    from mpo_megatron.config import OptimConfig
    from mpo_megatron.model.architecture import architecture_of
    from mpo_megatron.model.provider import ModelOptions
    from mpo_megatron.runtime.device import choose_device
    from mpo_megatron.training.checkpoint import load_checkpoint
    from mpo_megatron.training.checkpoint_writer import CheckpointWriter
    from mpo_megatron.training.optimizer import build_schedule

    architecture = architecture_of(config_of(size))
    on_gpu = choose_device(accelerator).type == "cuda"
    options = None if on_gpu else ModelOptions(dtype=torch.bfloat16)
    job = Job.start(architecture, 1, accelerator=accelerator, options=options, distributed_optimizer=True)
    schedule = build_schedule(job.optimizer, OptimConfig(lr=1e-3), 10)
    source_rows = job.source(random_groups(1, 64, 64, 2, architecture.vocab_size), max_tokens=256)
    reference = job.reference(source_rows)

    def peak_of(call: Any) -> tuple[Any, float, float]:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        return result, (torch.cuda.max_memory_allocated() - before) if on_gpu else 0.0, seconds

    def second_step() -> tuple[float, torch.Tensor]:
        loss = job.train(source_rows, [0], reference)
        return loss, torch.cat([p.detach().flatten().float().cpu() for p in job.chunks[0].parameters()])

    job.train(source_rows, [0], reference)
    writer = CheckpointWriter(folder, job.layout)

    def save() -> Path | None:
        writer.start(1, job.chunks, job.optimizer, schedule, {}, source)
        return writer.finish()

    path, saved, saving = peak_of(save)
    assert path is not None
    loss, weights = second_step()
    step, loaded, loading = peak_of(
        lambda: load_checkpoint(path, job.chunks, job.optimizer, schedule, job.layout)
    )
    assert step == 1
    loss_again, weights_again = second_step()
    return {
        "parameters": float(architecture.num_parameters),
        "save": float(saved),
        "load": float(loaded),
        "loss again": abs(loss_again - loss),
        "weights again": float((weights_again - weights).abs().max()),
        "seconds to save": saving,
        "seconds to load": loading,
    }


@pytest.mark.parametrize(
    ("place", "size", "world"),
    [on_cpu("tiny", 2), on_gpu("1B", 1), on_gpu("1B", 2), on_gpu("1B", 4)],
    indirect=["place"],
)
def test_a_checkpoint_takes_little_memory(
    size: str, world: int, place: Place, measured: Any, tmp_path: Path
) -> None:
    config_of(size).save_pretrained(tmp_path / "source")
    pool = place.ranks(world)
    arguments = (place.accelerator, size, tmp_path / "checkpoints", tmp_path / "source")
    found = pool.run(save_and_load, *arguments, timeout=290)
    most = {name: max(one[name] for one in found) for name in found[0]}
    for name, per_parameter in (("save", SAVE), ("load", LOAD)):
        measured(f"{name}, GiB", most[name] / GIB, at_most=per_parameter * most["parameters"] / GIB)
        measured(f"seconds to {name}", most[f"seconds to {name}"])
    measured("loss again", most["loss again"], at_most=1e-5)
    measured("weights again", most["weights again"], at_most=1e-2 if place.is_gpu else 0.0)
