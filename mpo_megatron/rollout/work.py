"""Records through a worker in batches, in this process or several, each finished batch kept at once.

A `Worker` maps the records of a batch to their values, one each, and the number of tokens that it read or wrote for
them. It is made once in each process by a `StartWorker` (which must be picklable: a function of a module, or a
`functools.partial` of one), from the process's number.

The value of a record may be a `Failure`: it is not kept, the others are, and a later start tries it again.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.parts import Parts, ShardWriter
from mpo_megatron.rollout.records import Record


@dataclass(frozen=True)
class Failure:
    """Why a record has no value."""

    reason: str


Worker = Callable[[list[Record]], tuple[list[Any], int]]
StartWorker = Callable[[int], Worker]
Batch = list[Record]
# Records, tokens and failures of a batch.
_Done = tuple[int, int, dict[str, Failure]]


def work_off(
    parts: Parts, batches: Sequence[Batch], start: StartWorker, *, processes: int, total: int, unit: str
) -> dict[str, Failure]:
    """Give every batch to a worker and append what it returns to the process's shard in `parts`.

    Args:
        total: records of the whole run; those that are in no batch were finished before.
        unit: what a record is, for the progress line.

    Returns the failures by the records' ids.

    Raises:
        UserError: a worker's, or one of the processes has died. What was finished is kept.
    """
    tokens = 0
    failures: dict[str, Failure] = {}
    waiting = sum(map(len, batches))
    with tqdm(total=total, initial=total - waiting, unit=unit) as progress:
        for records, more, failed in _done(parts.folder, batches, start, processes):
            tokens += more
            failures |= failed
            progress.update(records)
            if tokens:
                seconds = progress.format_dict["elapsed"]
                progress.set_postfix_str(f"{tokens / max(seconds, 1e-9):.0f} tokens/s")
    return failures


def _done(folder: Path, batches: Sequence[Batch], start: StartWorker, processes: int) -> Iterator[_Done]:
    """What each batch came to, as it is done."""
    if processes == 1:
        process = _Process(folder, start)
        try:
            yield from map(process.work, batches)
        finally:
            process.close()
        return
    # Forks of a process that has started threads or CUDA would hang.
    context = multiprocessing.get_context("spawn")
    workers = min(processes, len(batches))
    if not workers:
        return
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(folder, start)) as executor:
        futures = [executor.submit(_work, batch) for batch in batches]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (by the system, if memory ran out); what is done is kept: "
                "start again to go on, with fewer processes or smaller batches"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


class _Process:
    """A shard and a worker; both are made when the first batch comes, so that errors reach the caller."""

    def __init__(self, folder: Path, start: StartWorker) -> None:
        self._folder = folder
        self._start = start
        self._writer: ShardWriter | None = None
        self._worker: Worker | None = None

    def work(self, batch: Batch) -> _Done:
        if self._writer is None:
            self._writer = ShardWriter(self._folder)
        if self._worker is None:
            self._worker = self._start(self._writer.number)
        values, tokens = self._worker(batch)
        by_id = {record["id"]: value for record, value in zip(batch, values, strict=True)}
        failed = {name: value for name, value in by_id.items() if isinstance(value, Failure)}
        whole = {name: value for name, value in by_id.items() if name not in failed}
        self._writer.append(whole, whole.values())
        return len(batch), tokens, failed

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


# What follows runs in the processes of the pool.

_process: _Process | None = None


def _begin(folder: Path, start: StartWorker) -> None:
    global _process
    _process = _Process(folder, start)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Killed while this process was still starting: the thread alone might see it after the first batch is begun. What
    # `is_alive` looks at is open until the last of the parent's threads has ended, which may be after the kernel has
    # given this process another parent.
    if os.getppid() != parent.pid or not parent.is_alive():
        os._exit(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """A process whose parent was killed would go on, and write beside the run that takes its place."""
    parent.join()
    os._exit(1)


def _work(batch: Batch) -> _Done:
    assert _process is not None
    return _process.work(batch)
