"""Arrays in one file, appended as they are made: a process that is killed loses at most the one that it was writing."""

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_CHECKSUM_BYTES = 4


class Journal:
    """float32 arrays in a file: what is there is read when it is opened, more is appended.

    A record is a checksum and the values. The checksum is of the record's label too, so that records of something else
    count as none; the file ends before the first record that is cut short, damaged or of something else.

    Args:
        path: the file; made by the first `append`.
        labels: of each record, in order: int64 numbers that say what its values are of.

    Attributes:
        found: the values of the first records.

    Raises:
        OSError: the file is there and cannot be read or cut.
    """

    def __init__(self, path: Path, labels: Sequence[NDArray[np.int64]]) -> None:
        self._path = path
        self._labels = list(labels)
        content = path.read_bytes() if path.is_file() else b""
        self.found = list(_records(content, self._labels))
        end = sum(_CHECKSUM_BYTES + values.nbytes for values in self.found)
        if end < len(content):
            os.truncate(path, end)
        self._written = len(self.found)

    def append(self, values: NDArray[np.float32]) -> None:
        """Write the next record, which survives this process from now on.

        Raises:
            OSError: it cannot be written; the journal must not be appended to after that.
        """
        data = values.astype("<f4").tobytes()
        record = _checksum(self._labels[self._written], data) + data
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(record)
        self._written += 1

    def remove(self) -> None:
        """Delete the file: what it was for is done."""
        self._path.unlink(missing_ok=True)


def _records(content: bytes, labels: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[np.float32]]:
    start = 0
    for label in labels:
        data = content[start + _CHECKSUM_BYTES : start + _CHECKSUM_BYTES + 4 * len(label)]
        if len(data) < 4 * len(label) or content[start:][:_CHECKSUM_BYTES] != _checksum(label, data):
            return
        yield np.frombuffer(data, dtype="<f4").astype(np.float32)
        start += _CHECKSUM_BYTES + len(data)


def _checksum(label: NDArray[np.int64], data: bytes) -> bytes:
    return zlib.crc32(label.astype("<i8").tobytes() + data).to_bytes(_CHECKSUM_BYTES, "little")
