"""Raw records out of files, folders and hub datasets, each with its place for error messages.

JSON is read here, line by line, so that a broken line is named. Everything else goes through the `datasets`
library, in streaming mode: it keeps no copy of local files in its own cache, so an edited file is never
served stale.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi

from mpo_megatron.data.schema import DataError, ScoredGroup, group_from_record

Records = Iterator[tuple[str, Any]]

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_groups(
    path: str | Path, split: str | None = None, prompt_key: str | None = None
) -> Iterator[ScoredGroup]:
    """The groups of a data source, in order. Arguments, errors: see `read_records`, `group_from_record`."""
    for where, record in read_records(path, split):
        yield group_from_record(record, where, prompt_key)


def read_records(path: str | Path, split: str | None = None) -> Records:
    """Yields (place, record) for every record of a data source, in its order.

    Args:
        path: a .jsonl or .json file (one object a line, or one list of objects; also .gz), a .parquet file, a
            folder written by `Dataset.save_to_disk`, any folder that `datasets.load_dataset` reads (Parquet,
            CSV, JSON files), or the name of a dataset on the Hugging Face hub ("organisation/name").
        split: which split of a folder or hub dataset; needed only where there are several.

    Places are "file:line" for lines and "source[index]" or "source (split)[index]", counted from 0, for rows.

    Raises:
        DataError: nothing there, a broken line, an unreadable file, a split that is missing or ambiguous.
    """
    path = Path(path).expanduser()
    if path.is_file():
        reader = _file_reader(path)
        if split is not None:
            raise DataError(f"split={split!r} was asked of {path}, which is a single file; leave split out")
        return reader(path)
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


def _read_json(path: Path) -> Records:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            start = stream.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            is_list = start.startswith(b"[")
            yield from _json_list(path, stream.read()) if is_list else _json_lines(path, stream)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); write it again with gzip") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); mend the file or its permissions"
        ) from None


def _json_lines(path: Path, stream: Iterable[bytes]) -> Records:
    for number, line in enumerate(stream, start=1):
        where = f"{path}:{number}"
        if line.strip():
            yield where, _parse_json(line.rstrip(), where, "every line must hold one whole JSON object")


def _json_list(path: Path, text: bytes) -> Records:
    records = _parse_json(text, str(path), "a file that starts with [ must hold one JSON list of objects")
    for index, record in enumerate(records):
        yield f"{path}[{index}]", record


def _parse_json(text: bytes, where: str, rule: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start}: {error.reason}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {place}); {rule}") from None


# ---- through the datasets library --------------------------------------------------------------------------


_END = object()


def _read_parquet(path: Path) -> Records:
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
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
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

READERS: tuple[tuple[tuple[str, ...], Callable[[Path], Records]], ...] = (
    (JSON_SUFFIXES, _read_json),
    (PARQUET_SUFFIXES, _read_parquet),
)


def _file_reader(path: Path) -> Callable[[Path], Records]:
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
