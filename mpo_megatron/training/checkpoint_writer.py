"""Writing a run's checkpoints, while it waits or while it goes on.

A checkpoint is written under a temporary name. It gets its final one when every rank's part is complete and on the
storage, and not before: a run that is killed meanwhile, or a machine, leaves the one before it as the newest.

While the run goes on, a process forked of each rank writes a copy of that rank's share in host memory: Megatron's own
asynchronous strategy, or from 0.19 on that of nvidia-resiliency-ext, where there is a GPU and that is installed. One
checkpoint is under way at a time.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from mpo_megatron.conversion.buckets import Piece, write_pieces
from mpo_megatron.conversion.hf_folder import HF_FOLDER, copy_all_but_weights
from mpo_megatron.conversion.integrity import write_digests
from mpo_megatron.conversion.restore import replicas
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.errors import CheckpointError
from mpo_megatron.runtime.parallel import ParallelLayout, raise_together, raising_together
from mpo_megatron.runtime.publish import cannot_write, check_space, replace
from mpo_megatron.training.checkpoint import folder_of, sharded_models
from mpo_megatron.training.optimizer_state import BUCKETS, FORM, content, pieces, sharded_state
from mpo_megatron.training.write_results import WriteResults, used_by_megatron


@dataclass(frozen=True)
class _UnderWay:
    temporary: Path
    final: Path


class CheckpointWriter:
    """Writes into one folder, on storage that all ranks share; all ranks call each method.

    Args:
        folder: the run's checkpoints folder.
        form: of the distributed optimizer's state, BUCKETS or WHOLE; see `optimizer_state`.
        asynchronous: go on while it is written.
    """

    def __init__(
        self, folder: Path, layout: ParallelLayout, form: str = BUCKETS, *, asynchronous: bool = False
    ) -> None:
        self._folder, self._layout, self._form = folder, layout, form
        # What is the same in all checkpoints of a run is found out for the first: who writes what, and the buckets.
        self._strategy: FullyParallelSaveStrategyWrapper | None = None
        self._buckets: list[Piece] = []
        self._results = WriteResults()
        self._bytes = 0  # of a checkpoint
        self._queue: Any = None
        self._options: dict[str, str] = {}
        if asynchronous:
            self._queue, self._options = _queue(layout.device)
        self._under_way: _UnderWay | None = None

    def start(
        self,
        step: int,
        chunks: list[Any],
        optimizer: Any,
        schedule: OptimizerParamScheduler,
        files: dict[str, str],
        hf_source: Path,
    ) -> None:
        """Begin to write the state after optimizer step `step`; `finish` has to follow, before the next one too.

        Args:
            files: names and texts of small files to put into the checkpoint, such as the resolved configuration.
            hf_source: the Hugging Face folder of the start, whose config and tokenizer go into the checkpoint's `hf`
                folder.

        Raises:
            CheckpointError: the file system refuses, or has too little room; on all ranks.
        """
        assert self._under_way is None, "one checkpoint at a time"
        final = folder_of(self._folder, step)
        models = sharded_models(chunks)
        state = {
            **models,
            "optimizer": sharded_state(optimizer, models, self._form),
            "schedule": schedule.state_dict(),
            "step": step,
        }
        written = content(optimizer, self._form)
        is_first = self._strategy is None
        if is_first:
            self._bytes = self._count(state)
            base = get_default_save_sharded_strategy()
            self._strategy = FullyParallelSaveStrategyWrapper(base, replicas(), do_cache_distribution=True)
            if written.get(FORM) == BUCKETS:
                self._buckets = self._gather(pieces(optimizer, models, state["optimizer"]))
        temporary = self._new_folder(final)
        with self._writing(final), used_by_megatron(self._results):
            request = dist_checkpointing.save(
                state,
                str(temporary),
                self._strategy,
                validate_access_integrity=is_first,
                content_metadata=written,
                async_sharded_save=self._queue is not None,
                **self._options,
            )
            if self._queue is not None:
                self._queue.schedule_async_request(request)
        self._under_way = _UnderWay(temporary, final)
        with self._together(final):
            if self._layout.is_main:
                if self._buckets:
                    write_pieces(temporary, self._buckets)
                for name, text in files.items():
                    (temporary / name).write_text(text, encoding="utf-8")
                (temporary / HF_FOLDER).mkdir()
                copy_all_but_weights(hf_source, temporary / HF_FOLDER, next(chunks[0].parameters()).dtype)

    def finish(self, *, wait: bool = True) -> Path | None:
        """Give the checkpoint under way its name if it is complete. Returns its folder then; None: there is none yet.

        Args:
            wait: until it is.

        Raises:
            CheckpointError: it could not be written; on all ranks, and nothing is under way any more.
        """
        if self._under_way is None:
            return None
        under_way = self._under_way
        if self._queue is not None:
            with self._writing(under_way.final):
                if not self._queue.maybe_finalize_async_calls(blocking=wait):
                    return None
        self._under_way = None
        with self._together(under_way.final):
            if self._layout.is_main:
                _check_whole(under_way)
                write_digests(under_way.temporary)
                # Of small models the index and the rest is as much as the tensors.
                self._bytes = sum(path.stat().st_size for path in under_way.temporary.rglob("*"))
                replace(under_way.temporary, under_way.final)
        return under_way.final

    def close(self) -> None:
        """End what writes in the background; nothing may be under way."""
        assert self._under_way is None
        if self._queue is not None:
            self._queue.close()

    def _new_folder(self, final: Path) -> Path:
        """One to write into, of a name that nothing has had: a process of a killed run may still write into its own."""
        made = [""]
        with self._together(final):
            if self._layout.is_main:
                final.parent.mkdir(parents=True, exist_ok=True)
                check_space(final, self._bytes)
                made = [tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent)]
                Path(made[0]).chmod(0o755)  # mkdtemp's is for its maker alone
        dist.broadcast_object_list(made, src=0, group=self._layout.control)
        return Path(made[0])

    @contextmanager
    def _writing(self, final: Path) -> Iterator[None]:
        """A block in which Megatron tells all ranks that one could not write, and the first one why."""
        error = None
        try:
            yield
        # It is no Exception.
        except CheckpointException as caught:
            # Rank 0 alone has them, and its error is the one that all raise.
            reason = next((str(reason) for reason, _ in caught.failures.values()), "")
            error = CheckpointError(
                f"{final} cannot be written ({' '.join(reason.split())[:300]}); the checkpoints before it are "
                "whole: make room or mend the storage, and resume"
            )
        if error is not None:
            self._under_way = None
            raise_together(error, self._layout)

    @contextmanager
    def _together(self, final: Path) -> Iterator[None]:
        """A block in which rank 0 writes what is one rank's to write; all wait for it and raise its error."""
        with raising_together(self._layout):
            try:
                yield
            except OSError as error:
                raise cannot_write(final, error) from error

    def _count(self, state: dict[str, Any]) -> int:
        """Bytes of all ranks' tensors, of each that several have once."""
        own = sum(
            value.data.nbytes
            for value in nested_values(state)
            if isinstance(value, ShardedTensor | ShardedTensorFactory)
            and value.data is not None
            and is_main_replica(value.replica_id)
        )
        counts = [0] * self._layout.world_size
        dist.all_gather_object(counts, own, group=self._layout.control)
        return sum(counts)

    def _gather(self, own: list[Piece]) -> list[Piece]:
        """The lists of all ranks as one, on rank 0."""
        found: list[list[Piece]] | None = None
        if self._layout.is_main:
            found = [[] for _ in range(self._layout.world_size)]
        dist.gather_object(own, found, group=self._layout.control)
        return [item for items in found or [] for item in items]


def _check_whole(written: _UnderWay) -> None:
    """Check that all files are there, and as long as what the checkpoint says is in them."""
    try:
        CheckpointReader(written.temporary)
    except CheckpointError as error:
        raise CheckpointError(
            f"{written.final} is not whole though it was written without an error ({error}); the checkpoints before it "
            "are: mend the storage, and resume"
        ) from error


def _queue(device: torch.device) -> tuple[Any, dict[str, str]]:
    """(Megatron's queue of what is written in the background, what else to say when something is saved that way)."""
    try:
        from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support
        from megatron.core.dist_checkpointing.strategies.torch import get_async_strategy
    except ImportError:  # Megatron-core 0.16
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        return AsyncCallsQueue(), {}
    strategy = "nvrx" if device.type == "cuda" and has_nvrx_async_support() else "mcore"
    _, modules = get_async_strategy(strategy)
    return modules["AsyncCallsQueue"](), {"async_strategy": strategy}
