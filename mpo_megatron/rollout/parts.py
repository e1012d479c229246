"""What a run has finished so far, kept in a folder beside its output file until the output is whole.

    OUTPUT.parts/manifest.json   the settings and inputs that the folder was begun with
    OUTPUT.parts/00000.jsonl     a shard of each process: one line {"id", "value"} for each finished record
    OUTPUT.parts/lock            held by the run that writes

A line is appended as soon as its record is done, so that a run may be killed at any moment and started again: what has
a line is not done again, and half a line at the end of a shard is dropped. At the end the values are merged into the
output file in the order of the input, under a temporary name first, and the folder goes.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.records import Record, write_jsonl

_MANIFEST = "manifest.json"
# Of a model's weights the digest reads so many bytes at so many places: all that a step of training changes.
_PIECE_BYTES, _PIECES = 1 << 16, 16


class Parts:
    """The folder of a run, for as long as `begin` holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> dict[str, tuple[Path, int]]:
        """The place of each finished record's line, by id: its shard and the byte that it begins at.

        Raises UserError for a line that no run wrote.
        """
        places: dict[str, tuple[Path, int]] = {}
        for shard in _shards(self.folder):
            offset = 0
            with shard.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    # Half a line: its run was killed.
                    if not line.endswith(b"\n"):
                        break
                    try:
                        places.setdefault(json.loads(line)["id"], (shard, offset))
                    except (ValueError, KeyError, TypeError):
                        raise UserError(
                            f"{shard}:{number} is damaged; delete {self.folder} to begin anew"
                        ) from None
                    offset += len(line)
        return places

    def merge(
        self, output: Path, records: Sequence[Record], assemble: Callable[[Record, Any], Record]
    ) -> None:
        """Write `assemble(record, value)` of every record to `output`, in their order, and remove the folder.

        Raises UserError if a record is not finished.
        """
        write_jsonl(output, (assemble(record, value) for record, value in self._values(records)))
        _remove(self.folder)

    def _values(self, records: Sequence[Record]) -> Iterator[tuple[Record, Any]]:
        places = self.finished()
        with contextlib.ExitStack() as opened:
            files = {
                shard: opened.enter_context(shard.open("rb")) for shard in {s for s, _ in places.values()}
            }
            for record in records:
                if record["id"] not in places:
                    raise UserError(f"record {record['id']!r} is not in {self.folder}; start the run again")
                shard, offset = places[record["id"]]
                files[shard].seek(offset)
                yield record, json.loads(files[shard].readline())["value"]


class ShardWriter:
    """Appends finished records to a shard that no other process writes to.

    Attributes:
        number: the shard's, the lowest that is free: of N processes each has another, from 0 to N - 1 as a rule.
    """

    def __init__(self, folder: Path) -> None:
        for self.number in itertools.count():
            self._file = os.open(
                folder / f"{self.number:05d}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666
            )
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                os.close(self._file)
        if os.fstat(self._file).st_size:
            with mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) as content:
                whole = content.rfind(b"\n") + 1
            os.ftruncate(self._file, whole)

    def append(self, ids: Iterable[str], values: Iterable[Any]) -> None:
        """Write a line for each id and its value, and have them on the disk before it returns."""
        lines = [
            json.dumps({"id": name, "value": value}, ensure_ascii=False) + "\n"
            for name, value in zip(ids, values, strict=True)
        ]
        data = memoryview("".join(lines).encode())
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


@contextlib.contextmanager
def begin(output: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[Parts]:
    """Hold the folder of the run that writes `output`, new or left by an earlier start of it.

    Args:
        settings: what the values depend on, by the names that users know them by; JSON values.
        inputs: a digest of each record by its id, in their order.

    Raises:
        UserError: the folder was begun with other settings or inputs, another run holds it, or `output` is a folder.
    """
    if output.is_dir():  # said before anything is done, not when all of it is
        raise UserError(f"{output} is a folder; give the name of a file")
    folder = output.with_name(output.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run writes to {folder}; wait for it, or give another output file") from None
    try:
        _compare_or_write(folder, {"settings": dict(settings), "inputs": dict(inputs)})
        yield Parts(folder)
    finally:
        # A run that ended before it finished anything has nothing to go on with.
        if folder.is_dir() and not _has_lines(folder):
            _remove(folder)
        lock.release()


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.jsonl"))


def _has_lines(folder: Path) -> bool:
    for shard in _shards(folder):
        with shard.open("rb") as file:
            if file.readline().endswith(b"\n"):
                return True
    return False


def _remove(folder: Path) -> None:
    # First the manifest: what a kill leaves here is never taken for the parts of another run.
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _compare_or_write(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / _MANIFEST
    if not path.is_file() or not _has_lines(folder):
        for shard in _shards(folder):
            shard.unlink()
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        difference = _difference(before["settings"], before["inputs"], **manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; delete {folder} to begin anew") from None
    if difference:
        raise UserError(
            f"{folder} holds an unfinished run in which {difference}; give the same again to go on with it, "
            "or delete the folder to begin anew"
        )


def _difference(
    settings_before: Mapping[str, Any],
    inputs_before: Mapping[str, str],
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> str:
    """What an earlier start had otherwise, in words; nothing if all is the same."""
    for name in {**settings_before, **settings}:
        old, new = settings_before.get(name), settings.get(name)
        if old != new:
            return f"{name} was {old!r} and not {new!r}"
    for name, digest in inputs.items():
        if name not in inputs_before:
            return f"there was no record {name!r}"
        if inputs_before[name] != digest:
            return f"the record {name!r} was another"
    for name in inputs_before:
        if name not in inputs:
            return f"there was a record {name!r} more"
    return "" if list(inputs) == list(inputs_before) else "the records were in another order"


def digest_of(value: Any) -> str:
    """A short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_folder(folder: Path) -> str:
    """A short digest of a folder, such as a model's, or of a file: of names, sizes, and pieces all over each file."""
    digest = hashlib.sha256()
    paths = [folder] if folder.is_file() else folder.rglob("*")
    for path in sorted(path for path in paths if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            last = max(0, size - _PIECE_BYTES)
            for piece in range(_PIECES if last else 1):
                file.seek(last * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]
