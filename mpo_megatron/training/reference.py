"""Log-probabilities of the responses under the starting weights: computed once, cached on disk.

A training step compares the policy with the reference, and floating-point sums depend on how rows are cut. So the
reference runs over the very rows that the first epoch trains on: at step 0 both agree to the last bit and
every margin is exactly 0. The cache's key therefore holds, beside data and weights, all that shapes those
rows and their arithmetic: see `reference_key`.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mpo_megatron.model import head
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.scheduling.rows import Positions, RowSource
from mpo_megatron.training.report import say
from mpo_megatron.training.setup import Setup, Split
from mpo_megatron.training.step import response_logps


def weights_fingerprint(folder: str | Path) -> list[Any]:
    """What tells one set of weight files from another without reading them: place, name, size, time of change."""
    path = Path(folder).resolve()
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json", ".distcp"))
    return [str(path), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]]


def reference_key(split: Split, steps: Sequence[Positions], setup: Setup) -> dict[str, Any]:
    """All that the log-probs of a split's `steps` depend on, to the last bit.

    - `weights`: the files of the starting model; their reference is no other model's.
    - `data`: the content of the tokenised groups, so whatever made another of it: files, tokenizer, template, lengths.
    - `plan`: what decides which groups share a row. More steps, another batch or token budget, another order of the
      training data make other rows, and with them other sums.
    - `arithmetic`: what changes the rounding within a row: parallel layout, device and threads, precision, which
      layers, 8-bit recipe and attention run, the pieces in which the head works and the vocabulary's padding, library
      versions.

    Left out is what changes none of these, such as the objective, the optimizer and the recomputation of activations:
    runs that differ in it share a cache.
    """
    model, layout, options = setup.config.model, setup.layout, setup.model_options
    device = "cpu" if layout.device.type == "cpu" else torch.cuda.get_device_name(layout.device)
    return {
        "weights": weights_fingerprint(model.restore_from_path),
        "data": split.dataset.fingerprint,
        "plan": [len(steps), model.global_batch_size, split.source.max_tokens, split.source.alignment,
                 model.pack.shared_prompt, setup.config.trainer.seed if split.name == "train" else None],
        "arithmetic": [layout.sizes, device, str(options.dtype), torch.get_num_threads(),
                       options.sequence_parallel, options.transformer_engine, str(options.fp8),
                       options.attention_backend, options.head_chunk_size,
                       options.make_vocab_size_divisible_by, head.ARITHMETIC,
                       torch.__version__, version("megatron-core")],
    }  # fmt: skip


def cache_path(cache_dir: str | Path, key: dict[str, Any]) -> Path:
    """The cache file for everything in `key`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return Path(cache_dir).expanduser() / "reference" / f"{digest}.npy"


def reference_logps(
    chunks: list[Any],
    source: RowSource,
    steps: Sequence[Positions],
    layout: ParallelLayout,
    path: Path,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Tensor:
    """[responses of the data set] float32 log-probs under the chunks' present weights, from `path` or computed.

    All ranks call it; rank 0 writes the cache, under a temporary name first.

    Args:
        steps: the groups of each step, as positions in the data set; responses of groups in none of them are NaN.
        progress: wraps the steps while they are computed.
    """
    size = int(source.dataset.response_offsets[-1])
    cached = [path.is_file()]
    dist.broadcast_object_list(cached, src=0, group=layout.control)
    if cached[0]:  # read where it was written: other nodes may not see rank 0's cache
        values = torch.zeros(size, dtype=torch.float32, device=layout.device)
        if layout.is_main:
            values.copy_(torch.from_numpy(np.load(path)))
        dist.broadcast(values, src=0)
        return values
    for chunk in chunks:
        chunk.eval()
    rows = (source.step(positions) for positions in progress(steps))
    values = response_logps(chunks, rows, size, layout)
    seen = torch.zeros(size, dtype=torch.bool)
    for i in (i for positions in steps for i in positions):
        seen[source.dataset.response_offsets[i] : source.dataset.response_offsets[i + 1]] = True
    values[~seen.to(layout.device)] = float("nan")
    if layout.is_main:
        write(path, values)
    return values


def write(path: Path, values: Tensor) -> None:
    """Keep the log-probs, if the file system lets us: the run has them in any case."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
            np.save(file, values.cpu().numpy())
        Path(file.name).replace(path)
    except OSError as error:
        say(
            f"warning: {path} cannot be written ({error.strerror or error}), so the next start computes the reference "
            "again; make room, or set model.data.cache_dir to another folder"
        )
