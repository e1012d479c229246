"""Memory of `tools/convert_checkpoint.py import` and `export` on a synthetic model in many shards, against their bound.

The bound is three times the largest layer plus the embeddings (input and output). Memory is the resident set's highest
mark in a process of its own, above what the process held before the conversion, pages of mapped files included.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.benchmarks.report import Report
from mpo_megatron.conversion.convert import export_checkpoint, import_hf
from mpo_megatron.conversion.names import entries
from mpo_megatron.conversion.weight_writer import write_folder
from mpo_megatron.errors import UserError
from mpo_megatron.model.architecture import Architecture, architecture_of

# Layers of Llama-3.2-1B, more of them and with an output layer of their own: 3.2 GB in bfloat16.
FULL = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 18,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QUICK = {**FULL, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 32768}
SHARDS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    parser.add_argument("--folder", type=Path, help="where the models go, three times their size (temporary)")
    parser.add_argument("--tied", action="store_true", help="tie the output layer to the embedding")


def run(arguments: argparse.Namespace) -> Report:
    """Make the model, import it, export it, compare."""
    torch.set_num_threads(arguments.threads)
    from transformers import AutoConfig

    sizes = QUICK if arguments.quick else FULL
    config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=arguments.tied, dtype="bfloat16")
    architecture = architecture_of(config)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        config.save_pretrained(folder / "config")
        total = _write(folder, architecture)
        imported = _measured(import_hf, folder / "model", folder / "imported")
        exported = _measured(export_checkpoint, folder / "imported", folder / "exported")
        shards = len(list((folder / "model").glob("*.safetensors")))
    layer, embeddings = _bytes(architecture)
    bound = 3 * layer + embeddings
    return Report(
        benchmark="convert",
        columns=["", "peak, MB", "bound, MB", "model, MB", "CPU seconds"],
        rows=[
            [what, *(f"{value / 1e6:.0f}" for value in (peak, bound, total)), f"{seconds:.1f}"]
            for what, (peak, seconds) in (("import", imported), ("export", exported))
        ],
        figures={
            "import_peak_bytes": imported[0],
            "export_peak_bytes": exported[0],
            "bound_bytes": bound,
            "model_bytes": total,
        },
        settings={**sizes, "tied": arguments.tied, "shards": shards, "threads": arguments.threads, "dtype": "bf16"},
        notes=[
            "peak: highest resident set above that before the conversion, mapped pages included",
            f"bound: 3 x the largest layer ({layer / 1e6:.0f} MB) + embeddings ({embeddings / 1e6:.0f} MB)",
        ],
    )  # fmt: skip


def _shapes(architecture: Architecture) -> dict[str, torch.Size]:
    table = entries(architecture)
    return {name: shape for entry in table for name, shape in entry.shapes(architecture).items()}


def _write(folder: Path, architecture: Architecture) -> int:
    """Make the model. Returns its bytes."""
    shapes = _shapes(architecture)
    total = sum(shape.numel() for shape in shapes.values()) * 2

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.randn(math.prod(shape)).bfloat16().reshape(shape)

    output, source = folder / "model", folder / "config"
    write_folder(output, source, shapes, torch.bfloat16, tensors(), max_shard_bytes=total // SHARDS)
    return total


def _bytes(architecture: Architecture) -> tuple[int, int]:
    """(the largest layer's, the embeddings')."""
    shapes = _shapes(architecture)
    layer = sum(2 * shape.numel() for name, shape in shapes.items() if name.startswith("model.layers.0."))
    embeddings = sum(
        2 * shape.numel() for name, shape in shapes.items() if "embed" in name or "lm_head" in name
    )
    return layer, embeddings


def _measured(convert: Callable[..., Any], source: Path, output: Path) -> tuple[int, float]:
    """(peak bytes, processor seconds) of a conversion, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    process = context.Process(target=_convert, args=(convert, source, output, found))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"{convert.__name__} ended with status {process.exitcode}; see the message above")
    peak, seconds = found.get()
    return peak, seconds


def _convert(convert: Callable[..., Any], source: Path, output: Path, found: Any) -> None:
    from transformers import AutoConfig

    folder = source if (source / "config.json").is_file() else source / "hf"
    AutoConfig.from_pretrained(folder, trust_remote_code=False)  # its imports
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark starts anew
    before, start = _status("VmRSS"), time.process_time()
    convert(source, output)
    found.put((_status("VmHWM") - before, time.process_time() - start))


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
