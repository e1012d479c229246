import dataclasses
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from mpo_megatron.config import FaultConfig
from mpo_megatron.data import cache
from mpo_megatron.data.cache import DataReport
from mpo_megatron.data.dataset import build_dataset
from mpo_megatron.data.readers import read_groups
from mpo_megatron.data.schema import DataError
from mpo_megatron.data.selection import GroupDataset, Selection
from mpo_megatron.data.tokenize import GroupTokenizer, TokenizeOptions
from tests.helpers.tokenizers import CHATML, LLAMA2, make_tokenizer

OPTIONS = TokenizeOptions(max_prompt_length=80, max_length=160)


def record(number: int, scores: list[float], prompt: str = "Name a colour.") -> dict[str, Any]:
    responses = [
        {"text": f"Red {number}" + ", red" * k + ".", "score": score} for k, score in enumerate(scores)
    ]
    return {"id": f"g{number}", "prompt": f"{prompt} {number}", "responses": responses}


RECORDS = [
    record(0, [1.0, 2.0]),
    record(1, [3.0, 3.0, 3.0]),
    record(2, [0.5, 0.1, 0.9, 0.1]),
    record(3, [2.0, 1.0]),
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", RECORDS)


def build(data: Path, **changes: Any) -> GroupDataset:
    arguments = {"tokenizer": make_tokenizer(CHATML), "options": OPTIONS, "cache_dir": data.parent / "cache"}
    return build_dataset(data, **{**arguments, **changes})


def caches(data: Path) -> set[str]:
    return {path.name for path in (data.parent / "cache").iterdir() if path.is_dir()}


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a cache that fits must be opened, not made again")

    monkeypatch.setattr(GroupTokenizer, "__init__", fail)
    monkeypatch.setattr(GroupTokenizer, "__call__", fail)


# ---- content -------------------------------------------------------------------------------------------


def test_groups_are_what_the_tokenizer_gives(data: Path) -> None:
    built = build(data)
    # g1 has equal scores: no preferred response.
    expected = [group for group in read_groups(data) if group.id != "g1"]
    tokens = GroupTokenizer(make_tokenizer(CHATML), OPTIONS)(expected)
    assert len(built) == 3
    for i, (group, wanted) in enumerate(zip(expected, tokens, strict=True)):
        found = built.group(i)
        assert wanted is not None
        assert found.id == group.id
        assert found.prompt_ids.tolist() == wanted.prompt_ids
        assert [ids.tolist() for ids in found.response_ids] == wanted.response_ids
        assert found.scores.tolist() == [response.score for response in group.responses]
        assert found.prompt_ids.dtype == found.response_ids[0].dtype == np.int64
        assert found.scores.dtype == np.float64
        assert found.preferred.dtype == np.bool_
    preferred = [built.group(i).preferred.tolist() for i in range(3)]
    assert preferred == [[False, True], [True, False, True, False], [True, False]]


def test_arrays_are_the_callers_own(data: Path) -> None:
    built = build(data)
    built.group(0).prompt_ids[:] = 0
    built.group(0).response_ids[1][:] = 0
    assert built.group(0).prompt_ids.any()
    assert built.group(0).response_ids[1].any()


def test_lengths_and_numbers_of_responses(data: Path) -> None:
    built = build(data)
    assert built.response_offsets.tolist() == [0, 2, 6, 8]
    assert built.prompt_lengths.tolist() == [len(built.group(i).prompt_ids) for i in range(3)]
    for i in range(3):
        for k, ids in enumerate(built.group(i).response_ids):
            assert built.response_lengths[built.response_offsets[i] + k] == len(ids)
    for lengths in (built.prompt_lengths, built.response_lengths, built.response_offsets):
        assert lengths.dtype == np.int64
    assert len(built.response_lengths) == 8


@pytest.mark.parametrize("index", [-1, 3])
def test_index_outside(data: Path, index: int) -> None:
    with pytest.raises(IndexError):
        build(data).group(index)


def test_many_batches(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(data)
    monkeypatch.setattr(cache, "_BATCH_GROUPS", 1)
    apart = build(data, cache_dir=data.parent / "other")
    assert apart.fingerprint == whole.fingerprint
    assert apart.report == whole.report
    assert apart.group(2).prompt_ids.tolist() == whole.group(2).prompt_ids.tolist()


def test_parquet_gives_the_same_content(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parquet = data.with_name("train.parquet")
    with parquet.open("wb") as stream:
        datasets.Dataset.from_list(RECORDS).to_parquet(stream)
    capfd.readouterr()
    assert build(parquet).fingerprint == build(data).fingerprint
    assert capfd.readouterr().err == ""


def test_split_and_prompt_key_are_passed_on(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, split in enumerate(("train", "test")):
        renamed = {
            ("question" if key == "prompt" else key): value for key, value in RECORDS[number * 3].items()
        }
        write(folder / f"{split}.jsonl", [renamed])
    assert build(folder, split="train", prompt_key="question").group(0).id == "g0"
    assert build(folder, split="test", prompt_key="question").group(0).id == "g3"


# ---- report --------------------------------------------------------------------------------------------


def test_report_counts_everything(tmp_path: Path) -> None:
    # A prompt of one word per token or more: 5 groups, of which one too long and one without preference.
    long = record(9, [1.0, 0.0], prompt="Name three colours of the rainbow. " * 20)
    data = write(tmp_path / "train.jsonl", [*RECORDS, long])
    options = dataclasses.replace(OPTIONS, truncation="skip")
    report = build(data, options=options).report
    built = build(data, options=options)
    assert (
        report
        == built.report
        == DataReport(
            groups_read=5,
            groups_kept=3,
            skipped_no_preference=1,
            skipped_long_prompt=1,
            responses=8,
            prompt_tokens=int(built.prompt_lengths.sum()),
            response_tokens=int(built.response_lengths.sum()),
        )
    )
    line = str(report)
    assert line.startswith("3 of 5 groups kept, 8 responses, ")
    assert "1 groups skipped for lack of a preferred response; 1 groups skipped for too long a prompt" in line
    assert "\n" not in line
    assert "cut" not in line

    cut = dataclasses.replace(OPTIONS, truncation="left", max_length=OPTIONS.max_prompt_length + 1)
    report = build(write(tmp_path / "long.jsonl", [long]), options=cut).report
    assert (report.truncated_prompts, report.truncated_responses) == (1, 2)
    assert "1 prompts cut on the left; 2 responses cut at max_length" in str(report)
    assert (report.prompt_tokens, report.response_tokens) == (OPTIONS.max_prompt_length, 2)


def test_report_counts_what_the_tokenizer_reports(data: Path) -> None:
    plain = dataclasses.replace(OPTIONS, apply_chat_template=False)
    records = [
        {"prompt": "of the ", "responses": [{"text": "rainbow", "score": 1}, {"text": "7", "score": 0}]}
    ]
    report = build(write(data, records), options=plain).report
    assert report.border_merges == 1
    assert "1 responses tokenised apart" in str(report)


def test_nothing_kept(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", [record(0, [1.0, 1.0]), record(1, [2.0, 2.0])])
    with pytest.raises(DataError) as caught:
        build(data)
    message = str(caught.value)
    assert message.startswith(f"{data}: nothing is left to train on: 0 of 2 groups kept")
    assert "2 groups skipped for lack of a preferred response" in message
    assert len(build(data, selection=Selection(needs_preferred=False))) == 2
    with pytest.raises(DataError, match="holds no groups"):
        build(write(data, []))


def test_bad_data_leaves_no_cache(data: Path) -> None:
    write(data, [*RECORDS, {"prompt": "p", "responses": []}])
    with pytest.raises(DataError, match=r"train\.jsonl:5: the group has no responses"):
        build(data)
    assert caches(data) == set()
    write(data, RECORDS)
    assert len(build(data)) == 3


# ---- the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selection",
    [
        Selection(partition="median"),
        Selection(keep_best=1, keep_worst=1),
        Selection(score_noise=0.5),
        Selection(needs_preferred=False),
    ],
)
def test_another_selection_tokenises_nothing(
    selection: Selection, data: Path, request: pytest.FixtureRequest
) -> None:
    first = build(data)
    request.getfixturevalue("no_tokenising")
    second = build(data, selection=selection)
    assert second.fingerprint != first.fingerprint
    assert build(data, selection=selection).fingerprint == second.fingerprint


def test_second_build_tokenises_nothing(data: Path, request: pytest.FixtureRequest) -> None:
    first = build(data)
    request.getfixturevalue("no_tokenising")
    with pytest.raises(AssertionError, match="must be opened"):
        build(data, cache_dir=data.parent / "other")
    second = build(data)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    assert second.group(1).prompt_ids.tolist() == first.group(1).prompt_ids.tolist()


def test_cache_serves_the_same_content_elsewhere(data: Path, no_tokenising: None, tmp_path: Path) -> None:
    """The key holds no absolute path: a node that mounts the data elsewhere finds the same cache."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere / data.name, RECORDS)
    keys = [
        cache.cache_key(path, make_tokenizer(CHATML), OPTIONS, None, None, FaultConfig())
        for path in (data, elsewhere / data.name)
    ]
    assert keys[0] == keys[1]


def test_paths_may_start_at_home(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data.parent))
    assert len(build(Path("~/train.jsonl"), cache_dir="~/cache")) == 3
    assert len(caches(data)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"options": dataclasses.replace(OPTIONS, max_length=159)},
        {"options": dataclasses.replace(OPTIONS, truncation="left")},
        {"options": dataclasses.replace(OPTIONS, system_prompt="Be brief.")},
        {"tokenizer": make_tokenizer(LLAMA2)},
        {"tokenizer": make_tokenizer(CHATML.replace("You are helpful.", "You are kind."))},
        {"tokenizer": make_tokenizer(CHATML, adds_bos=True)},
    ],
)
def test_other_options_make_another_cache(data: Path, changes: dict[str, Any]) -> None:
    build(data)
    assert len(caches(data)) == 1
    build(data, **changes)
    assert len(caches(data)) == 2


def test_edited_data_makes_another_cache(data: Path) -> None:
    first = build(data)
    stat = data.stat()
    data.write_text(data.read_text(encoding="utf-8").replace("Red 3", "Tan 3"), encoding="utf-8")
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    second = build(data)
    assert second.fingerprint != first.fingerprint
    assert second.group(2).response_ids[0].tolist() != first.group(2).response_ids[0].tolist()


def test_key_ignores_how_the_tokenizer_was_used_last(data: Path) -> None:
    tokenizer = make_tokenizer(CHATML)
    before = cache.cache_key(data, tokenizer, OPTIONS, None, None, FaultConfig())
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(8)
    assert cache.cache_key(data, tokenizer, OPTIONS, None, None, FaultConfig()) == before


@pytest.mark.parametrize("change", ["id", "score", "text"])
def test_fingerprint_follows_the_content(data: Path, change: str) -> None:
    first = build(data)
    edited = json.loads(json.dumps(RECORDS))
    if change == "id":
        edited[0]["id"] = "other"
    elif change == "score":
        edited[0]["responses"][1]["score"] = 2.5
    else:
        edited[0]["responses"][1]["text"] += "!"
    assert build(write(data, edited)).fingerprint != first.fingerprint


def test_remains_of_a_killed_process_are_replaced(data: Path) -> None:
    key = cache.cache_key(data, make_tokenizer(CHATML), OPTIONS, None, None, FaultConfig())
    unfinished = data.parent / "cache" / f"{key}.{socket.gethostname()}.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "groups.arrow").write_bytes(b"half")
    assert len(build(data)) == 3
    assert caches(data) == {key}


def test_where_a_lock_holds_no_other_node_the_first_cache_stays(data: Path) -> None:
    """Two nodes that have filled the same cache: the second finds the name taken, and takes what is there."""
    folder = data.parent / "cache" / "key"
    folder.parent.mkdir()
    with cache.published(folder) as ours:
        (ours / "by").write_text("us")
        # The other node has finished meanwhile.
        folder.mkdir()
        (folder / "by").write_text("the other")
    assert [path.name for path in folder.parent.iterdir()] == ["key"]
    assert (folder / "by").read_text() == "the other"


def test_a_cache_that_cannot_be_written_is_one_sentence(data: Path) -> None:
    (data.parent / "file").touch()
    with pytest.raises(
        DataError, match=r"file cannot be written \(File exists\), and tokenised data go there"
    ):
        build(data, cache_dir=data.parent / "file")


def test_opening_reads_no_tokens(data: Path) -> None:
    """Tokens come from the memory-mapped file when asked for: none are allocated by opening it."""
    built = build(data)
    before = pa.total_allocated_bytes()
    again = build(data)
    assert pa.total_allocated_bytes() == before
    in_memory = datasets.Dataset.from_file(again._base._rows.cache_files[0]["filename"], in_memory=True)
    assert pa.total_allocated_bytes() > before, "reading them shows"
    assert (
        again.group(0).prompt_ids.tolist() == built.group(0).prompt_ids.tolist() == in_memory[0]["prompt_ids"]
    )


def _build_in_process(data: Path, log: Path, start: Any) -> None:
    """Builds when the others do; writes its process id each time it tokenises, slowly so that builds overlap."""
    tokenise = GroupTokenizer.__call__

    def slowly(self: GroupTokenizer, groups: Any, on_fault: Any) -> Any:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"tokenised by {os.getpid()}\n")
        time.sleep(0.5)
        return tokenise(self, groups, on_fault)

    GroupTokenizer.__call__ = slowly  # type: ignore[method-assign, assignment]
    start.wait(timeout=30)
    built = build(data)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"built {built.fingerprint}\n")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_of_processes_at_once_one_does_the_work(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=_build_in_process, args=(data, log, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    lines = log.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("tokenised by") for line in lines) == 1
    assert [line for line in lines if line.startswith("built")] == [f"built {build(data).fingerprint}"] * 3
    assert len(caches(data)) == 1


# ---- what a user sees ----------------------------------------------------------------------------------


def test_progress_bar_for_many_groups_only(
    data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_GROUPS_WITHOUT_PROGRESS", 4)
    build(data)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(cache, "_GROUPS_WITHOUT_PROGRESS", 3)
    build(data, cache_dir=data.parent / "other")
    assert f"Tokenising {data}: 4 groups" in capfd.readouterr().err
