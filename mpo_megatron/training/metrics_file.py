"""metrics.jsonl: a line of JSON for each set of values, whole or not there, whatever ends the run or fills the disk."""

import json
import os
from pathlib import Path
from typing import Any

from mpo_megatron.errors import CheckpointError


class MetricsFile:
    """The lines of a run, those of its earlier starts included. A last line that was being written is dropped.

    So are lines that are none of this file's, as a machine that lost its power leaves them: zeros for what was not yet
    on the disk. The run goes on without them.

    Args:
        path: the file; made if it is not there.

    Attributes:
        damaged: how many such lines there were.

    Raises:
        CheckpointError: the file cannot be written, here and in all that writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.is_file() else []
        whole = [line for line in lines if _is_ours(line)]
        self.damaged = len(lines) - len(whole)
        self._keep(whole)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line to the file system."""
        data = json.dumps(line).encode() + b"\n"
        start = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            os.truncate(self._file, start)  # of a line that fitted in part
            raise self._cannot_write(error) from error

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return read_metrics(self._path)

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        self.close()
        self._keep([json.dumps(line).encode() for line in self.read() if line["step"] <= step])

    def close(self) -> None:
        """Close the file, which nothing can be appended to after that."""
        os.close(self._file)

    def _keep(self, lines: list[bytes]) -> None:
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        try:
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))
            temporary.replace(self._path)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._path} cannot be written ({error.strerror or error}); make room, then the same command goes on "
            "from the newest checkpoint with exp_manager.resume_if_exists=true"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, of a run that may still write it; those that are damaged are left out.

    Raises OSError if it cannot be read.
    """
    return [json.loads(line) for line in path.read_bytes().splitlines() if _is_ours(line)]


def _is_ours(line: bytes) -> bool:
    try:
        values = json.loads(line)
        return isinstance(values["step"], int) and isinstance(values["split"], str)
    except (ValueError, RecursionError, TypeError, KeyError):
        return False
