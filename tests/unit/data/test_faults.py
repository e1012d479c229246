"""Each fault of the data: what ends a run, what is left out of it, and what is said of either."""

import gzip
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import KEPT_FAULTS, FaultConfig
from mpo_megatron.data import GroupDataset, TokenizeOptions, build_dataset, readers
from mpo_megatron.data.cache import DataReport
from mpo_megatron.data.faults import FAULTS
from mpo_megatron.data.schema import DataError, RecordError, group_from_record
from tests.helpers.tokenizers import LLAMA2, make_tokenizer

STOP_AT_ALL = FaultConfig(equal_responses="error")
SKIP_ALL = FaultConfig(**{field.name: "skip" for field in fields(FaultConfig)})


def record(name: str, **changes: Any) -> dict[str, Any]:
    responses = [{"text": "Red.", "score": 2.0}, {"text": "Seven.", "score": 1.0}]
    return {"id": name, "prompt": "Name a colour.", "responses": responses} | changes


def line(name: str, **changes: Any) -> bytes:
    return json.dumps(record(name, **changes)).encode()


def scores(*values: Any) -> list[dict[str, Any]]:
    return [{"text": f"Red {n}.", "score": value} for n, value in enumerate(values)]


# (fault, line, what the message says).
LINES: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("unreadable", b'{"id": "x", "prompt"', "not valid JSON (Expecting ':' delimiter at column 21)"),
    "not UTF-8": ("unreadable", line("x").replace(b"Red.", b"R\xe9d."), "not UTF-8 (byte "),
    "UTF-16": ("unreadable", json.dumps(record("x")).encode("utf-16"), "not UTF-8 (byte 0: invalid start byte)"),
    "half a character": ("unreadable", line("x", prompt="\ud83d"), r"the prompt has \ud83d, half of a character"),
    "nested too deep": ("unreadable", b"[" * 100_000, "nested too deep"),
    "a number of 5,000 digits": ("unreadable", b'{"id": ' + b"1" * 5000 + b"}", "a number of more than 4300 digits"),
    "no object": ("shape", b'"text"', "found a text; a record must be an object"),
    "unknown shape": ("shape", b'{"text": "x"}', "no known shape has the keys found (text)"),
    "a number for a text": ("shape", line("x", prompt=7), "the prompt is a number; it must be a list of objects"),
    "an object for an id": ("shape", line("x", id={}), "the id is an object; it must be a text or a number"),
    "one response": ("shape", line("x", responses=scores(1.0)), "the group has 1 response and needs at least 2"),
    "NaN": ("score", line("x", responses=scores(1, float("nan"))), "response 2 of 2 has score nan; scores must be fin"),
    "infinity": ("score", line("x", responses=scores(1, float("-inf"))), "response 2 of 2 has score -inf; scores mus"),
    "above float64": ("score", line("x", responses=scores(1, 10**400)), "000, beyond 3.4e+38; scale"),
    "above float32": ("score", line("x", responses=scores(1, 1e39)), "has score 1e+39, beyond 3.4e+38; scale"),
    "a text for a score": ("score", line("x", responses=scores(1, "2")), "has score '2', a text; scores must be num"),
    "white space": ("empty", line("x", responses=[{"text": " \n", "score": 1}, *scores(2)]), "response 1 of 2 is emp"),
    "an empty prompt": ("empty", line("x", prompt="\t"), "the prompt is empty"),
    "a system message": (
        "template",
        line("x", prompt=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]),
        "the tokenizer's chat template refuses messages of system, user",
    ),
    "an id twice": ("duplicate_id", line("g0"), "the id 'g0' is that of {path}:1 too; give every record its own"),
    "one text with two scores": (
        "unequal_scores",
        line("x", responses=[*scores(1, 2), *scores(1), {"text": " Red 1.", "score": 3}]),
        "responses 2 and 4 of 4 are equal and have scores 2 and 3; remove one of them",
    ),
    "equal responses": (
        "equal_responses",
        line("x", responses=[*scores(1, 2), {"text": " Red 0.", "score": 1}]),
        "responses 1 and 3 of 3 are equal; remove one of them",
    ),
    "long prompt": ("long_prompt", line("x", prompt="word " * 60), "tokens, and max_prompt_length is 40"),
}  # fmt: skip


def build(path: Path, policy: FaultConfig | None = None, truncation: str = "error") -> GroupDataset:
    options = TokenizeOptions(max_prompt_length=40, max_length=120, truncation=truncation)
    tokenizer = make_tokenizer(LLAMA2)
    return build_dataset(path, tokenizer, options, cache_dir=path.parent / "cache", faults=policy)


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(b"".join(content + b"\n" for content in lines))
    return path


def test_every_fault_has_a_case_and_a_count() -> None:
    assert {fault for fault, _, _ in LINES.values()} == set(FAULTS)
    assert {f"skipped_{fault}" for fault in FAULTS} <= {field.name for field in fields(DataReport)}
    assert set(KEPT_FAULTS) < set(FAULTS)


@pytest.mark.parametrize("name", LINES)
def test_a_fault_ends_the_run_with_one_sentence(name: str, tmp_path: Path) -> None:
    fault, content, said = LINES[name]
    path = write(tmp_path, line("g0"), content, line("g2"))
    with pytest.raises(DataError) as caught:
        build(path, STOP_AT_ALL if fault == "equal_responses" else None)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert said.format(path=path) in message
    assert "\n" not in message
    assert len(message) < 700
    if fault != "long_prompt":
        assert message.endswith(f"; or leave such groups out: model.data.faults.{fault}=skip")
    assert not [found for found in (tmp_path / "cache").iterdir() if found.is_dir()]


@pytest.mark.parametrize("name", LINES)
def test_a_fault_that_is_skipped_is_counted_and_noted(name: str, tmp_path: Path) -> None:
    fault, content, said = LINES[name]
    path = write(tmp_path, line("g0"), content, line("g2"))
    alone = FaultConfig() if fault == "long_prompt" else FaultConfig(**{fault: "skip"})
    built = build(path, alone, "skip" if fault == "long_prompt" else "error")
    # The others, as if it had not been there.
    assert [built.group(i).id for i in range(len(built))] == ["g0", "g2"]
    assert getattr(built.report, f"skipped_{fault}") == 1
    assert (built.report.groups_read, built.report.groups_kept) == (3, 2)
    assert str(built.report).startswith("2 of 3 groups kept, 4 responses, ")
    (noted,) = [json.loads(text) for text in built.skipped.read_text(encoding="utf-8").splitlines()]
    assert (noted["where"], noted["fault"]) == (f"{path}:2", fault)
    assert said.format(path=path) in noted["why"]


def test_all_faults_at_once(tmp_path: Path) -> None:
    named = [
        content.replace(b'"id": "x"', b'"id": "x%d"' % n) for n, (_, content, _) in enumerate(LINES.values())
    ]
    path = write(tmp_path, line("g0"), *named, line("last"))
    built = build(path, SKIP_ALL, "skip")
    assert [built.group(i).id for i in range(len(built))] == ["g0", "last"]
    counts = {fault: sum(of == fault for of, _, _ in LINES.values()) for fault in FAULTS}
    assert {fault: getattr(built.report, f"skipped_{fault}") for fault in FAULTS} == counts
    assert built.report.groups_read == len(LINES) + 2
    places = [json.loads(text)["where"] for text in built.skipped.read_text(encoding="utf-8").splitlines()]
    assert sorted(places) == sorted(f"{path}:{number}" for number in range(2, len(LINES) + 2))
    assert f"{counts['unreadable']} records skipped for what is no JSON or no text" in str(built.report)


@pytest.mark.parametrize("name", ["an id twice", "one text with two scores", "equal responses"])
def test_what_can_be_trained_on_is_kept_where_it_is_asked_for(name: str, tmp_path: Path) -> None:
    fault, content, _ = LINES[name]
    built = build(write(tmp_path, line("g0"), content), FaultConfig(**{fault: "keep"}))
    assert len(built) == 2
    assert built.report.groups_read == 2
    assert built.skipped.read_text() == ""


def test_a_group_with_two_faults_is_left_out_once(tmp_path: Path) -> None:
    twice = line("g0", responses=[*scores(1, 2), {"text": "Red 0.", "score": 3}])
    built = build(write(tmp_path, line("g0"), twice), SKIP_ALL)
    assert built.report.groups_read == 2
    assert (built.report.skipped_duplicate_id, built.report.skipped_unequal_scores) == (1, 0)


def test_the_id_of_a_group_that_was_left_out_is_free(tmp_path: Path) -> None:
    built = build(write(tmp_path, line("g", responses=scores(1, None)), line("g")), SKIP_ALL)
    assert len(built) == 1
    assert built.report.skipped_duplicate_id == 0


def test_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing is left to train on: 0 of 2 groups kept.* 2 records skipped for a sc"
    ):
        build(write(tmp_path, *[line(name, responses=scores(1, None)) for name in "ab"]), SKIP_ALL)


def test_the_policy_is_part_of_what_a_cache_is_named_after(tmp_path: Path) -> None:
    path = write(tmp_path, line("g0"), line("g0"), line("g1"))
    assert len(build(path, FaultConfig(duplicate_id="skip"))) == 2
    assert len(build(path, FaultConfig(duplicate_id="keep"))) == 3
    with pytest.raises(DataError, match=r"train\.jsonl:2: the id 'g0' is that of .*train\.jsonl:1 too"):
        build(path)


def test_a_line_of_100_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as stream:
        stream.write(line("g0") + b"\n" + b'{"id": "' + b"x" * (100 << 20) + b'"}\n' + line("g2") + b"\n")
    with pytest.raises(
        DataError, match=r"train\.jsonl:2: the line has 67,108,864 bytes or more; write one group a"
    ):
        build(path)
    assert [group.where for group in readers.read_groups(path, on_fault=lambda _: True)] == [
        f"{path}:1",
        f"{path}:3",
    ]


@pytest.mark.parametrize("ends", [b"", b"\n"])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 16, 17])
def test_lines_around_the_longest(beyond: int, ends: bytes, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 16)
    text = b'{"a": "' + b"x" * (16 + beyond - 9 - len(ends)) + b'"}' + ends
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"a": 1}\n' + text + (b'{"a": 2}\n' if ends else b""))
    left_out: list[RecordError] = []
    found = [where for where, _ in readers.read_records(path, on_fault=lambda e: not left_out.append(e))]  # type: ignore[func-returns-value]
    fits = len(text) < 16 or (len(text) == 16 and ends)
    assert (f"{path}:2" in found) == bool(fits)
    assert len(left_out) == (not fits)
    assert (f"{path}:3" in found) == bool(ends)


def test_messages_of_large_groups_are_one_readable_line(tmp_path: Path) -> None:
    many = [{"text": f"Red {n}.", "score": float(n)} for n in range(2000)]
    cases = [
        line("x", responses=[*many, {"text": "Red 7.", "score": 1.0}]),
        line("x", responses=[*many, {"text": "Red", "score": "x" * 100_000}]),
        line("x", responses=[*many, {"text": "Red", "label": ["x" * 100_000]}]),
        json.dumps({f"key\n{n}" * 100: n for n in range(2000)}).encode(),
        line("x", prompt=[{"role": "user", "content": "Hi."}] * 2001 + [{"role": "x" * 9999, "content": ""}]),
        line("x", prompt=[{"role": "system", "content": "Hi."}, {"role": "user", "content": "Hi."}] * 2000),
        line("y" * 100_000),
    ]
    for content in cases:
        path = write(tmp_path, line("y" * 100_000), content)
        with pytest.raises(DataError) as caught:
            build(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1300, str(caught.value)


def test_sides_that_are_nested_too_deep_to_compare() -> None:
    def turns() -> list[Any]:
        nested: Any = 1
        for _ in range(100_000):
            nested = [nested]
        return [{"role": "user", "content": nested}, {"role": "assistant", "content": "Red."}]

    with pytest.raises(RecordError, match="nested too deep"):
        group_from_record({"chosen": turns(), "rejected": turns()}, "train.jsonl:1")


def test_an_error_reaches_other_ranks_whole() -> None:
    error = RecordError("train.jsonl:3", "the prompt is empty; write one", "empty")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "train.jsonl:3: the prompt is empty; write one"
    assert (copy.where, copy.fault) == (error.where, error.fault)


def test_a_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl.gz"
    whole = gzip.compress(b"".join(line(f"g{n}") + b"\n" for n in range(2000)))
    for place in range(20, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"train\.jsonl\.gz"):
            list(readers.read_groups(path))
