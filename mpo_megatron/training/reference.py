"""Log-probabilities of the responses under the starting weights: computed once, cached on disk.

The pass runs over the very rows that the first epoch trains on: at step 0 policy and reference agree to the last bit
and every margin is exactly 0. It keeps each step's log-probs as it goes: a start that was stopped in it costs one step.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.scheduling.rows import Positions, RowSource
from mpo_megatron.training.journal import Journal
from mpo_megatron.training.reference_cache import ReferenceCache
from mpo_megatron.training.report import say
from mpo_megatron.training.step import response_logps


def reference_logps(
    chunks: list[Any],
    source: RowSource,
    steps: Sequence[Positions],
    layout: ParallelLayout,
    cache: ReferenceCache,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Tensor:
    """[responses of the data set] float32 log-probs under the chunks' present weights, from the cache or computed.

    All ranks call it. Rank 0 alone reads and writes the cache, since other nodes may not see its disk, and says what is
    left to compute.

    Args:
        steps: the groups of each step, as positions in the data set; responses of groups in none of them are NaN.
        progress: wraps the steps while they are computed.
    """
    size = int(source.dataset.response_offsets[-1])
    kept = Kept(cache, source, steps) if layout.is_main else None
    left = [kept.left if kept else []]
    dist.broadcast_object_list(left, src=0, group=layout.control)
    if left[0]:
        for chunk in chunks:
            chunk.eval()
        with source.steps([steps[i] for i in left[0]]) as made:
            for i, rows in zip(progress(left[0]), made, strict=True):
                values = response_logps(chunks, [rows], size, layout)
                if kept is not None:
                    kept.add(i, values)
    values = torch.zeros(size, dtype=torch.float32, device=layout.device)
    if kept is not None:
        values.copy_(torch.from_numpy(kept.finish()))
    dist.broadcast(values, src=0)
    return values


class Kept:
    """Rank 0's log-probs of a split: what the disk has of them, and what is computed now.

    Attributes:
        values: [responses] float32, NaN where there are none.
        left: the steps to compute.
    """

    def __init__(self, cache: ReferenceCache, source: RowSource, steps: Sequence[Positions]) -> None:
        offsets = source.dataset.response_offsets
        self._cache = cache
        # Of each step, the numbers of its responses.
        self._numbers = [np.concatenate([np.arange(*offsets[i : i + 2]) for i in step]) for step in steps]
        size = int(offsets[-1])
        needed = np.zeros(size, dtype=np.bool_)
        needed[np.concatenate(self._numbers)] = True
        self.values, self._others = cache.read(size, needed)
        self.left = [i for i, responses in enumerate(self._numbers) if np.isnan(self.values[responses]).any()]
        self._computed = bool(self.left)
        self._journal = self._open_journal() if cache.resumes and self.left else None
        if self._others:
            say(
                f"reference   {cache.title}: {self._others} of {needed.sum()} log-probs are of other rows, another "
                "layout or other software (model.mpo.reference_exact=false); margins at step 0 need not be exactly 0"
            )

    def _open_journal(self) -> Journal | None:
        """Take what an earlier start has come to."""
        try:
            journal = Journal(self._cache.journal, [self._numbers[i] for i in self.left])
        except OSError as error:
            self._cannot_write(self._cache.journal, error)
            return None
        for i, values in zip(self.left, journal.found, strict=False):
            self.values[self._numbers[i]] = values
        if journal.found:
            done, total = len(journal.found), len(self.left)
            say(
                f"reference   {self._cache.title}: goes on after {done} of {total} steps, where a start was stopped"
            )
            self.left = self.left[done:]
        return journal

    def add(self, step: int, values: Tensor) -> None:
        """Keep the log-probs of a step's responses, from those of all [responses]."""
        found = values.float().cpu().numpy()[self._numbers[step]]
        self.values[self._numbers[step]] = found
        if self._journal is not None:
            try:
                self._journal.append(found)
            except OSError as error:
                self._cannot_write(self._cache.journal, error)
                self._journal = None

    def finish(self) -> NDArray[np.float32]:
        """Write the cache, under a temporary name first. Returns the log-probs: the run has them in any case."""
        if self._computed:
            path = self._cache.mixed if self._others else self._cache.own
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                    np.save(file, self.values)
                Path(file.name).replace(path)
                if self._journal is not None:
                    self._journal.remove()
            except OSError as error:
                self._cannot_write(path, error)
        return self.values

    def _cannot_write(self, path: Path, error: OSError) -> None:
        say(
            f"warning: {path} cannot be written ({error.strerror or error}), so the next start computes the reference "
            "again; make room, or set model.data.cache_dir to another folder"
        )
