"""What the processes that write a checkpoint tell the rank that forked them.

Megatron has a server for it, a process that begins by running the imports of the main script again at a rank's first
save: some 10 s of a core and 300 MB for each rank. It stays as long as the run, and longer if the rank is killed; and
what a failed save left in it is taken for the next one's. What is said is short, and is said before the writer ends, so
a file in memory that both have open does the same.
"""

import io
import os
import pickle
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class WriteResults:
    """A queue to this process from itself and from those forked of it, of which one at a time puts.

    It has of `multiprocessing.Queue` what Megatron's writer calls.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("write results"), "r+b")
        self._read = 0

    def put(self, results: Any) -> None:
        """Add something that can be pickled."""
        data = memoryview(pickle.dumps(results))
        end = self._size()
        while data:
            written = os.pwrite(self._file.fileno(), data, end)
            data, end = data[written:], end + written

    def get_nowait(self) -> Any:
        """The next of what was put by processes that have ended, or by this one.

        Raises:
            queue.Empty: there is nothing, or a part of what a process wrote that was killed.
        """
        unread = io.BytesIO(os.pread(self._file.fileno(), self._size() - self._read, self._read))
        try:
            results = pickle.load(unread)
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error
        self._read += unread.tell()
        return results

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size


@contextmanager
def used_by_megatron(results: WriteResults) -> Iterator[None]:
    """A block in which Megatron prepares a save, whose processes then put there."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = results
    try:
        yield
    finally:
        filesystem_async._results_queue = before
