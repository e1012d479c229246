"""Raw records out of files, folders and hub datasets, each with its place for error messages.

JSON is read here, line by line, so that a broken line is named. Everything else goes through the `datasets`
library, in streaming mode: it keeps no copy of local files in its own cache, so an edited file is never
served stale.

A record at fault goes to an `OnFault`, which raises it or says whether it is left out.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import logging
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi

from mpo_megatron.config import FaultConfig
from mpo_megatron.data.faults import Faults, OnFault, repeats, stop
from mpo_megatron.data.schema import DataError, RecordError, ScoredGroup, fail, group_from_record

Records = Iterator[tuple[str, Any]]
_Stream = gzip.GzipFile | io.BufferedReader

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
# A line may be longer than any group is; nothing of it is kept.
LONGEST_LINE = 64 << 20
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_groups(
    path: str | Path, split: str | None = None, prompt_key: str | None = None, on_fault: OnFault | None = None
) -> Iterator[ScoredGroup]:
    """The groups of a data source, in order. Arguments, errors: see `read_records`, `group_from_record`.

    What becomes of records at fault is as in the configuration's defaults, without an `on_fault`.

    An id that an earlier group has and responses of one text are faults too; a group of these that `on_fault` does not
    leave out is given as it is. The ids and places of all groups are kept for that.
    """
    on_fault = on_fault or Faults(FaultConfig())
    seen: dict[str, str] = {}
    for where, record in read_records(path, split, on_fault):
        try:
            group = group_from_record(record, where, prompt_key)
        except RecordError as error:
            on_fault(error)
            continue
        if not any(on_fault(error) for error in repeats(group, seen)):
            seen.setdefault(group.id, where)
            yield group


def read_records(path: str | Path, split: str | None = None, on_fault: OnFault = stop) -> Records:
    """Yields (place, record) for every record of a data source, in its order.

    Args:
        path: a .jsonl or .json file (one object a line, or one list of objects; also .gz), a .parquet file, a
            folder written by `Dataset.save_to_disk`, any folder that `datasets.load_dataset` reads (Parquet,
            CSV, JSON files), or the name of a dataset on the Hugging Face hub ("organisation/name").
        split: which split of a folder or hub dataset; needed only where there are several.
        on_fault: told of lines that cannot be read; a line that it does not raise is left out.

    Places are "file:line" for lines and "source[index]" or "source (split)[index]", counted from 0, for rows.

    Raises:
        DataError: nothing there, a broken line, an unreadable file, a split that is missing or ambiguous.
    """
    path = Path(path).expanduser()
    if path.is_file():
        reader = _file_reader(path)
        if split is not None:
            raise DataError(f"split={split!r} was asked of {path}, which is a single file; leave split out")
        return reader(path, on_fault)
    if path.is_dir():
        return _read_folder(path, split)
    if _is_hub_name(path):
        return _rows(*_load(str(path), split))
    raise _missing(path)


def content_digest(path: str | Path) -> str:
    """A text that changes with what `read_records` reads: a digest of all files, or the revision of a hub
    dataset."""
    path = Path(path).expanduser()
    digest = hashlib.sha256()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif _is_hub_name(path):
        with _readable(str(path)):
            return f"{path}@{HfApi().dataset_info(str(path)).sha}"
    else:
        raise _missing(path)
    for file in files:
        digest.update(
            f"{file.name if file == path else file.relative_to(path)}\0{file.stat().st_size}\0".encode()
        )
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


# ---- JSON --------------------------------------------------------------------------------------------------


def _read_json(path: Path, on_fault: OnFault) -> Records:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            start = stream.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            is_list = start.startswith(b"[")
            yield from _json_list(path, stream.read()) if is_list else _json_lines(path, stream, on_fault)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); write it again with gzip") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); mend the file or its permissions"
        ) from None


def _json_lines(path: Path, stream: _Stream, on_fault: OnFault) -> Records:
    for number, line in enumerate(_lines(stream), start=1):
        where = f"{path}:{number}"
        try:
            if line is None:
                fail(
                    where,
                    f"the line has {LONGEST_LINE:,} bytes or more; write one group a line",
                    "unreadable",
                )
            if not line.strip():
                continue
            record = _parse_json(line.rstrip(), where, "every line must hold one whole JSON object")
        except RecordError as error:
            on_fault(error)
            continue
        yield where, record


def _lines(stream: _Stream) -> Iterator[bytes | None]:
    """Each line; None for one above LONGEST_LINE, which is gone past in parts."""
    while line := stream.readline(LONGEST_LINE):
        if len(line) < LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_LINE)
        yield None


def _json_list(path: Path, text: bytes) -> Records:
    try:
        records = _parse_json(text, str(path), "a file that starts with [ must hold one JSON list of objects")
    except RecordError as error:
        raise DataError(str(error)) from None  # no record of it can be told from another
    for index, record in enumerate(records):
        yield f"{path}[{index}]", record


def _parse_json(text: bytes, where: str, rule: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        fail(where, f"not UTF-8 (byte {error.start}: {error.reason}); save the file as UTF-8", "unreadable")
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        fail(where, f"not valid JSON ({error.msg} at {place}); {rule}", "unreadable")
    except RecursionError:
        fail(where, f"nested too deep; {rule}", "unreadable")
    except ValueError:
        fail(where, f"a number of more than {sys.get_int_max_str_digits()} digits; {rule}", "unreadable")


# ---- through the datasets library --------------------------------------------------------------------------


_END = object()


def _read_parquet(path: Path, on_fault: OnFault) -> Records:
    rows, _ = _load("parquet", None, shown=str(path), data_files={"train": str(path)})
    return _rows(rows, str(path))


def _read_folder(path: Path, split: str | None) -> Records:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # written by save_to_disk
        with _quiet_datasets(), _readable(str(path)):
            return _rows(*_one_split(datasets.load_from_disk(str(path)), split, str(path)))
    return _rows(*_load(str(path), split))


def _load(
    source: str, split: str | None, shown: str | None = None, **arguments: Any
) -> tuple[Iterable[Any], str]:
    shown = shown or source
    with _quiet_datasets(), _readable(shown), tempfile.TemporaryDirectory() as locks:
        loaded = datasets.load_dataset(source, streaming=True, cache_dir=locks, **arguments)
        return _one_split(loaded, split, shown)


def _one_split(loaded: Any, split: str | None, shown: str) -> tuple[Iterable[Any], str]:
    """The rows of the split, and how places in it are shown."""
    if not isinstance(loaded, dict):  # what save_to_disk wrote of one Dataset
        if split is not None:
            raise DataError(f"split={split!r} was asked of {shown}, which has no splits; leave split out")
        return loaded, shown
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split not in loaded:
        problem = "a split must be chosen" if split is None else f"there is no split {split!r}"
        raise DataError(f"{shown}: {problem}; set split to one of: {', '.join(loaded)}")
    return loaded[split], f"{shown} ({split})"


def _rows(loaded: Iterable[Any], shown: str) -> Records:
    rows = iter(loaded)
    for index in itertools.count():
        with _quiet_datasets(), _readable(shown):  # not across the yield, where the caller's code runs
            record = next(rows, _END)
        if record is _END:
            return
        yield f"{shown}[{index}]", record


@contextlib.contextmanager
def _readable(shown: str) -> Iterator[None]:
    """Turns what `datasets` raises for unreadable sources into one sentence."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of datasets, pyarrow, fsspec, the hub: they have no base in common
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0][:200]
        raise DataError(
            f"{shown} cannot be read as a dataset ({reason}); give a .jsonl or .parquet file, a folder of "
            "them, a folder written by save_to_disk, or a hub dataset that this machine can reach"
        ) from error


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars or warnings of `datasets` inside; its settings are as before afterwards."""
    bars_were_off = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error it also raises
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()


# ---- choosing ----------------------------------------------------------------------------------------------

READERS: tuple[tuple[tuple[str, ...], Callable[[Path, OnFault], Records]], ...] = (
    (JSON_SUFFIXES, _read_json),
    (PARQUET_SUFFIXES, _read_parquet),
)


def _file_reader(path: Path) -> Callable[[Path, OnFault], Records]:
    for suffixes, reader in READERS:
        if path.name.lower().endswith(suffixes):
            return reader
    known = ", ".join(suffix for suffixes, _ in READERS for suffix in suffixes)
    raise DataError(f"{path}: files of this kind cannot be read; name it with what it holds, one of: {known}")


def _is_hub_name(path: Path) -> bool:
    known = tuple(suffix for suffixes, _ in READERS for suffix in suffixes)
    return (
        bool(HUB_NAME.fullmatch(str(path)))
        and not path.name.lower().endswith(known)
        and not path.parent.is_dir()
    )


def _missing(path: Path) -> DataError:
    return DataError(
        f"there is no file or folder {path.absolute()}; correct the path or write the data first"
    )
