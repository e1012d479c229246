"""Where reference log-probabilities are kept on disk, and under which key.

Floating-point sums depend on how rows are cut, and margins at step 0 are exactly 0 only if the reference is that of the
very rows that training uses. So the key holds, beside model and data, all that shapes those rows and their arithmetic
(`reference_key`). Where that is not asked for (`model.mpo.reference_exact=false`), log-probs of the same weights, data
and precision count, whatever rows they were computed in.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_megatron.model import head
from mpo_megatron.scheduling.rows import Positions
from mpo_megatron.training.setup import Setup, Split

# What two caches of the same responses must have in common to be of the same model; the rest of a key is rounding.
_SUBJECT = ("weights", "data", "precision")


def weights_fingerprint(folder: str | Path) -> list[Any]:
    """What tells one set of weight files from another without reading them: place, name, size, time of change."""
    path = Path(folder).resolve()
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json", ".distcp"))
    return [str(path), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]]


def reference_key(split: Split, steps: Sequence[Positions], setup: Setup) -> dict[str, Any]:
    """All that the log-probs of a split's `steps` depend on, to the last bit.

    - `weights`: the files of the reference, which as a rule is the starting model; it is no other model's.
    - `data`: the content of the tokenised groups, so whatever made another of it: files, tokenizer, template, lengths.
    - `precision`: of the products: the weights' type, the 8-bit recipe, and how the head makes log-probs of logits.
    - `plan`: what decides which groups share a row. More steps, another batch or token budget, another order of the
      training data make other rows, and with them other sums.
    - `arithmetic`: what changes the rounding within a row: parallel layout, device and threads, which layers and
      attention run, the pieces in which the head works and the vocabulary's padding, library versions.

    The last two change log-probs by rounding alone: `model.mpo.reference_exact=false` does without them. Left out is
    what changes nothing, such as the objective, the optimizer and the recomputation of activations: runs that differ
    in it share a cache.
    """
    model, layout, options = setup.config.model, setup.layout, setup.model_options
    device = "cpu" if layout.device.type == "cpu" else torch.cuda.get_device_name(layout.device)
    return {
        "weights": weights_fingerprint(model.reference_path),
        "data": split.dataset.fingerprint,
        "precision": [str(options.dtype), str(options.fp8), head.ARITHMETIC],
        "plan": [len(steps), model.global_batch_size, split.source.max_tokens, split.source.alignment,
                 model.pack.shared_prompt, setup.config.trainer.seed if split.name == "train" else None],
        "arithmetic": [layout.sizes, device, torch.get_num_threads(),
                       options.sequence_parallel, options.transformer_engine,
                       options.attention_backend, options.head_backend, options.head_chunk_size,
                       options.make_vocab_size_divisible_by,
                       torch.__version__, version("megatron-core")],
    }  # fmt: skip


@dataclass(frozen=True)
class ReferenceCache:
    """Where the log-probs of a split are kept.

    Attributes:
        title: the split, for people.
        folder: of all that are of the same weights and data in the same precision.
        name: of those among them that are this run's own to the last bit.
        exact: whether these alone will do.
        resumes: whether a pass can go on in the middle and come to the same numbers.
    """

    title: str
    folder: Path
    name: str
    exact: bool = True
    resumes: bool = True

    @property
    def own(self) -> Path:
        return self.folder / f"{self.name}.npy"

    @property
    def mixed(self) -> Path:
        """Of this run's and of others' log-probs."""
        return self.folder / f"{self.name}.mixed.npy"

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.name}.journal"

    def read(self, size: int, needed: NDArray[np.bool_]) -> tuple[NDArray[np.float32], int]:
        """([size] log-probs, NaN where there are none; how many of the `needed` ones are not this run's own)."""
        values = np.load(self.own) if self.own.is_file() else np.full(size, np.nan, dtype=np.float32)
        if self.exact or not self.folder.is_dir():
            return values, 0
        others = 0
        for path in sorted(self.folder.glob("*.npy"), key=lambda file: file.stat().st_mtime_ns, reverse=True):
            found = np.load(path)
            taken = needed & np.isnan(values) & ~np.isnan(found)
            values[taken] = found[taken]
            others += int(taken.sum())
        return values, others


def reference_cache(split: Split, steps: Sequence[Positions], setup: Setup) -> ReferenceCache:
    """Where this run's log-probs of the split's `steps` are kept, below `model.data.cache_dir`."""
    key, fp8 = reference_key(split, steps, setup), setup.model_options.fp8
    subject = {name: key.pop(name) for name in _SUBJECT}
    return ReferenceCache(
        split.name,
        Path(setup.config.model.data.cache_dir).expanduser() / "reference" / _digest(subject),
        _digest(key),
        exact=setup.config.model.mpo.reference_exact,
        # Delayed scales remember the rows before.
        resumes=fp8 is None or fp8.repeats_itself,
    )


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
