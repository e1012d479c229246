import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from mpo_megatron.data import readers
from mpo_megatron.data.readers import content_digest, read_groups, read_records
from mpo_megatron.data.schema import DataError

RECORDS: list[dict[str, Any]] = [
    {
        "id": str(i),
        "prompt": f"p{i} ü",
        "responses": [{"text": "a", "score": 1.0}, {"text": "b", "score": 0.5 * i}],
    }
    for i in range(3)
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(LINES, encoding="utf-8")
    return path


def error_of(path: Path | str, split: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path, split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- JSON ---------------------------------------------------------------------------------------------------


def test_jsonl_gives_file_and_line(jsonl: Path) -> None:
    assert list(read_records(jsonl)) == [(f"{jsonl}:{i + 1}", record) for i, record in enumerate(RECORDS)]
    assert list(read_records(str(jsonl))) == list(read_records(jsonl))


def test_blank_lines_count_but_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"a": 1}\n  \n{"a": 2}', encoding="utf-8")
    assert list(read_records(path)) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"a": 2})]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [record for _, record in read_records(path)] == [{"a": 1}, {"a": 2}]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    assert list(read_records(path)) == [(f"{path}:{i + 1}", record) for i, record in enumerate(RECORDS)]
    path.write_bytes(gzip.compress(LINES.encode())[:-20])
    assert f"{path}: cannot be unpacked" in error_of(path)
    path.write_text(LINES, encoding="utf-8")
    assert f"{path}: cannot be unpacked" in error_of(path)


def test_json_list(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(" \n" + json.dumps(RECORDS, indent=4), encoding="utf-8")
    assert list(read_records(path)) == [(f"{path}[{i}]", record) for i, record in enumerate(RECORDS)]
    path.write_text(json.dumps(RECORDS, indent=4)[:-2], encoding="utf-8")
    assert f"{path}: not valid JSON" in error_of(path)


def test_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    assert list(read_records(tmp_path / "data.jsonl")) == []


def test_broken_line_is_named_after_the_good_ones(jsonl: Path) -> None:
    jsonl.write_text(LINES + '{"id": "3", "prompt": \n' + LINES, encoding="utf-8")
    records = read_records(jsonl)
    assert [next(records)[1] for _ in RECORDS] == RECORDS
    with pytest.raises(DataError) as caught:
        next(records)
    assert str(caught.value) == (
        f"{jsonl}:4: not valid JSON (Expecting value at column 22); "
        "every line must hold one whole JSON object"
    )


def test_line_that_is_not_utf8(jsonl: Path) -> None:
    jsonl.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    assert f"{jsonl}:2: not UTF-8 (byte 7: invalid start byte)" in error_of(jsonl)


# ---- through the datasets library ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    (root / "splits").mkdir()
    (root / "lines").mkdir()
    readers_were_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(RECORDS)
    table.to_parquet(root / "data.parquet")
    table.to_parquet(root / "splits" / "train-00000-of-00001.parquet")
    table.select([2]).to_parquet(root / "splits" / "test-00000-of-00001.parquet")
    table.save_to_disk(root / "saved")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(root / "saved_splits")
    (root / "lines" / "data.jsonl").write_text(LINES, encoding="utf-8")
    if not readers_were_quiet:
        datasets.enable_progress_bars()
    return root


@pytest.mark.parametrize(
    ("name", "split", "place", "expected"),
    [
        ("data.parquet", None, "data.parquet", RECORDS),
        ("splits", "train", "splits (train)", RECORDS),
        ("splits", "test", "splits (test)", RECORDS[2:]),
        ("saved", None, "saved", RECORDS),
        ("saved_splits", "test", "saved_splits (test)", RECORDS[1:2]),
        ("lines", None, "lines (train)", RECORDS),
    ],
)
def test_sources_of_the_datasets_library(
    folders: Path, name: str, split: str | None, place: str, expected: list[dict[str, Any]]
) -> None:
    wanted = [(f"{folders / place}[{i}]", record) for i, record in enumerate(expected)]
    assert list(read_records(folders / name, split)) == wanted


@pytest.mark.parametrize("name", ["splits", "saved_splits"])
def test_split_must_be_one_of_several(folders: Path, name: str) -> None:
    assert "a split must be chosen; set split to one of: " in error_of(folders / name)
    message = error_of(folders / name, "validation")
    assert "there is no split 'validation'" in message
    assert "train" in message
    assert "test" in message


def test_split_of_what_has_none(folders: Path, jsonl: Path) -> None:
    for path in (folders / "saved", folders / "data.parquet", jsonl):
        assert f"split='train' was asked of {path}" in error_of(path, "train")


def test_unreadable_sources(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.parquet").write_text("hello", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.jsonl").write_text('{"a": 1}\n{"a"', encoding="utf-8")
    for name in ("data.parquet", "empty", "broken"):
        message = error_of(tmp_path / name)
        assert message.startswith(str(tmp_path / name))
        assert "cannot be read as a dataset (" in message
    assert capfd.readouterr().err == ""


def test_settings_of_datasets_are_left_as_they_were(folders: Path) -> None:
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    records = read_records(folders / "data.parquet")
    next(records)
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before
    list(records)
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


def test_nothing_is_left_in_the_cache_of_datasets(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("data.parquet", "saved", "lines"):
        assert len(list(read_records(folders / name))) == 3
    assert not list(tmp_path.rglob("*"))
    list(datasets.load_dataset("parquet", data_files=str(folders / "data.parquet"), streaming=True)["train"])
    assert list(tmp_path.rglob("*")), "the library itself does leave something, so the check above can fail"


def test_edited_parquet_is_read_again(tmp_path: Path) -> None:
    path = str(tmp_path / "data.parquet")
    for value in (1, 2):
        datasets.Dataset.from_list([{"a": value}]).to_parquet(path)
        assert list(read_records(path)) == [(f"{path}[0]", {"a": value})]


def test_hub_name_goes_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(source: str, **arguments: Any) -> dict[str, list[dict[str, int]]]:
        asked.append((source, arguments["streaming"]))
        return {"train": [{"a": 1}], "test": [{"a": 2}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_records("org/feedback-v1.0", "test")) == [("org/feedback-v1.0 (test)[0]", {"a": 2})]
    assert asked == [("org/feedback-v1.0", True)]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(source: str, **arguments: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of("org/feedback")
    assert message.startswith(
        "org/feedback cannot be read as a dataset (ConnectionError: Couldn't reach the hub);"
    )


# ---- choosing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "missing", "a/b/c", "org/missing.parquet", "existing/missing"]
)
def test_missing_file_is_named_with_its_absolute_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    assert (
        error_of(name)
        == f"there is no file or folder {tmp_path / name}; correct the path or write the data first"
    )
    with pytest.raises(DataError, match="there is no file or folder"):
        content_digest(name)


def test_file_of_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").touch()
    assert "one of: .jsonl, .json, .jsonl.gz, .json.gz, .parquet" in error_of(tmp_path / "data.xlsx")


def test_groups_name_the_line_of_bad_data(jsonl: Path) -> None:
    jsonl.write_text(LINES + '{"prompt": "p", "responses": [{"text": "a", "score": 1}]}\n', encoding="utf-8")
    groups = read_groups(jsonl)
    assert [next(groups).id for _ in RECORDS] == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"data\.jsonl:4: the group has 1 response and needs at least 2"):
        next(groups)


# ---- digests ------------------------------------------------------------------------------------------------


def test_digest_follows_the_content_not_the_place(jsonl: Path, tmp_path: Path) -> None:
    digest = content_digest(jsonl)
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "data.jsonl"
    copy.write_text(LINES, encoding="utf-8")
    assert content_digest(copy) == digest
    stat = copy.stat()
    copy.write_text(LINES.replace("p0", "q0"), encoding="utf-8")
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    assert content_digest(copy) != digest


def test_digest_of_a_folder_follows_every_file(folders: Path) -> None:
    digest = content_digest(folders / "splits")
    assert digest == content_digest(folders / "splits")
    (folders / "splits" / "nested").mkdir()
    (folders / "splits" / "nested" / "note.txt").write_text("x", encoding="utf-8")
    assert content_digest(folders / "splits") != digest


def test_digest_of_a_hub_dataset_is_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    api = SimpleNamespace(dataset_info=lambda name: SimpleNamespace(sha=f"revision of {name}"))
    monkeypatch.setattr(readers, "HfApi", lambda: api)
    assert content_digest("org/feedback") == "org/feedback@revision of org/feedback"
