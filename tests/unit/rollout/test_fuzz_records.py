"""Whatever lies in a file of prompts, samples or scores: records that tools take, or one sentence with the place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation.pairs import check_comparable, joined, matched, parted, read_scored
from mpo_megatron.rollout.constraints import constraint_types, satisfaction
from mpo_megatron.rollout.generation import Sampling, temperature_of, uniforms
from mpo_megatron.rollout.parts import digest_of
from mpo_megatron.rollout.records import Record, prompt_text, read_groups, read_prompts, write_jsonl
from mpo_megatron.rollout.rewards import mean_score, verified_score
from tests.helpers.fuzzing import SCALARS, TEXT, TRIED, changed, check_message, damaged, tries

pytestmark = pytest.mark.usefixtures("inputs_are_counted")


GROUP: Record = {
    "id": "a",
    "prompt": "Name a colour.",
    "temperature": 0.5,
    "split": "train",
    "topic_words": ["colour"],
    "constraints": [
        {"type": "max_words", "limit": 3},
        {"type": "word_range", "minimum": 1, "maximum": 4},
        {"type": "include_words", "words": ["red"]},
    ],
    "responses": [
        {"text": "Red.", "score": 1.0, "finish_reason": "stop"},
        {"text": "Green", "score": 2, "finish_reason": "length"},
    ],
    "other": None,
}
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
KEYS = st.sampled_from([*GROUP, "text", "score", "type", "limit", "minimum", "role", "content"]) | TEXT
WORDS = st.sampled_from(["user", "assistant", "system", "stop", "length", *constraint_types()])
VALUES = (
    TEXT
    | SCALARS
    | st.recursive(
        SCALARS | WORDS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=8,
    )
)
SAMPLING = Sampling(samples=2, temperature=1.0, top_p=1.0, max_new_tokens=3, seed=0)


def check_prompts(records: list[Record]) -> None:
    for record in records:
        prompt_text(record).encode()
        digest_of(record)
        assert len(uniforms(0, record["id"], 1, 3)) == 3
        try:
            assert float(temperature_of(record, SAMPLING)) > 0
        except UserError as error:
            check_message(error)


def check_groups(records: list[Record]) -> None:
    check_prompts(records)
    for record in records:
        for response in record["responses"]:
            satisfied = [satisfaction(response["text"], one) for one in record["constraints"]]
            assert all(0 <= one <= 1 for one in satisfied)
            topics = record.get("topic_words", [])
            score = verified_score(
                response["text"],
                record["constraints"],
                prompt=prompt_text(record),
                finished=response["finish_reason"] == "stop",
                topic_words=topics,
            )
            assert 0 <= score <= 10


def check_scored(records: list[Record]) -> None:
    check_prompts(records)
    pairs = matched(records, records)
    for pair, again in zip(pairs, parted(joined(pairs)), strict=True):
        for group, found in zip(pair, again, strict=True):
            assert [one["text"] for one in found["responses"]] == [one["text"] for one in group["responses"]]
    assert all(abs(mean_score(record)) < 4e38 for record in records)
    try:
        check_comparable(pairs)
    except UserError as error:
        check_message(error)


READERS: list[tuple[Callable[[Path], list[Record]], Callable[[list[Record]], None]]] = [
    (read_prompts, check_prompts),
    (read_groups, check_groups),
    (read_scored, check_scored),
]


def check_file(path: Path) -> None:
    for read, check in READERS:
        try:
            records = read(path)
        except UserError as error:
            check_message(error, str(path))
            TRIED["refused"] += 1
            continue
        TRIED["taken"] += 1
        check(records)
        again = path.with_name("again.jsonl")
        write_jsonl(again, records)
        # NaN is not equal to itself.
        assert json.dumps(read(again)) == json.dumps(records)


@tries(300)
@given(record=changed(GROUP, VALUES) | changed({**GROUP, "prompt": TURNS}, VALUES), escaped=st.booleans())
def test_any_record(record: Any, escaped: bool, tmp_path: Path) -> None:
    line = json.dumps(record, ensure_ascii=escaped) + "\n"
    (tmp_path / "groups.jsonl").write_bytes(line.encode(errors="surrogatepass"))
    check_file(tmp_path / "groups.jsonl")


@tries(150)
@given(
    content=damaged(
        b"\n".join(json.dumps({**GROUP, "id": name}).encode() for name in "ab"),
        (b"\n", b"[", b"{", b'"', b"\\ud800", b"1e999", b"NaN", b"9" * 400),
    )
)
def test_damaged_lines(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "groups.jsonl").write_bytes(content)
    check_file(tmp_path / "groups.jsonl")


@pytest.mark.parametrize(
    ("field", "where"),
    [
        ({"id": "\ud800"}, "the field 'id'"),
        ({"other": [{"\udd8a": 1}]}, "the field 'other'"),
        ({"\udd8a": 1}, r"the field '\\udd8a'"),
        ({"responses": [{"text": "\ud83e!", "finish_reason": "stop"}]}, "the field 'responses'"),
    ],
)
def test_half_a_character_is_not_taken(field: Record, where: str, tmp_path: Path) -> None:
    """The output, which holds all of a record, could not be written."""
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps({**GROUP, **field}) + "\n")
    with pytest.raises(
        UserError, match=rf"groups.jsonl:1: {where} has \\u\w+, half of a character, at \d+; write"
    ):
        read_groups(path)


@pytest.mark.parametrize("score", [10**400, 1e308, float("nan"), True, "1"])
def test_scores_are_numbers_that_training_takes(score: Any, tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps({**GROUP, "responses": [{**GROUP["responses"][0], "score": score}]}) + "\n")
    with pytest.raises(UserError, match="group 'a' has a response with score="):
        read_scored(path)
