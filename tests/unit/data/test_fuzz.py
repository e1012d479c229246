"""Whatever lies in a file of data: groups or one sentence with the place, never anything else."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_megatron.data import GroupTokenizer, TokenizeOptions
from mpo_megatron.data.readers import read_groups
from mpo_megatron.data.schema import RecordError, group_from_record
from tests.helpers.fuzzing import TEXT, TRIED, check_message, damaged, tries
from tests.helpers.reading import check_file, check_group
from tests.helpers.tokenizers import CHATML, LLAMA2, make_tokenizer

OPTIONS = TokenizeOptions(max_prompt_length=60, max_length=100, truncation="skip")


pytestmark = pytest.mark.usefixtures("inputs_are_counted")


# ---- what files and records may be -------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**309, -(10**400), 1e39, -1e308])
    | TEXT
    | st.sampled_from(["preferred", "dispreferred", "length", "user", "assistant", "system", ""])
)
KEYS = st.sampled_from([
    "id", "prompt_id", "prompt", "messages", "instruction", "responses", "text", "score", "label", "finish_reason",
    "completions", "response", "overall_score", "chosen", "rejected", "score_chosen", "rejected_score",
    "all_generated_responses", "all_rm_scores", "role", "content",
])  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXT, inner, max_size=5),
    max_leaves=20,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT}
    ),
    max_size=4,
)
PROMPTS = TEXT | TURNS
NUMBERS = st.floats(-10, 10) | SCALARS
RESPONSES = st.fixed_dictionaries(
    {"text": TEXT | SCALARS}, optional={"score": NUMBERS, "label": SCALARS, "finish_reason": SCALARS}
)
COMPLETIONS = st.fixed_dictionaries({"response": TEXT, "overall_score": NUMBERS})
# Near to what is right, in each shape.
RECORDS = st.one_of(
    st.fixed_dictionaries(
        {"prompt": PROMPTS, "responses": st.lists(RESPONSES, max_size=5)}, optional={"id": SCALARS | VALUES}
    ),
    st.fixed_dictionaries({"instruction": PROMPTS, "completions": st.lists(COMPLETIONS, max_size=4)}),
    st.fixed_dictionaries(
        {"prompt": PROMPTS, "chosen": TEXT | TURNS, "rejected": TEXT | TURNS},
        optional={"score_chosen": NUMBERS, "score_rejected": NUMBERS},
    ),
    st.fixed_dictionaries(
        {
            "prompt": PROMPTS,
            "all_generated_responses": st.lists(TEXT) | VALUES,
            "all_rm_scores": st.lists(NUMBERS) | VALUES,
        }
    ),
    # What is right but for one thing.
    st.fixed_dictionaries(
        {
            "id": st.just("x") | SCALARS | VALUES,
            "prompt": st.just("Name a colour."),
            "responses": st.tuples(
                st.fixed_dictionaries({"text": TEXT | st.just("Red."), "score": st.just(1.0) | NUMBERS}),
                st.just({"text": "Seven.", "score": 0.5}),
            ).map(list),
        }
    ),
)
GOOD = json.dumps(
    {
        "id": "ü",
        "prompt": "Name 🦊.",
        "responses": [{"text": "Red", "score": 1.5}, {"text": "é", "score": 2}],
    },
    ensure_ascii=False,
).encode()


DAMAGED = st.integers(1, 3).flatmap(
    lambda lines: damaged(b"\n".join([GOOD] * lines), (b"\n", b"[", b"{", b'"', b"\\ud800", b"1e999"))
)


# ---- what must hold: tests/helpers/reading.py -------------------------------------------------------------


@tries(300)
@given(content=DAMAGED)
def test_damaged_lines(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    TRIED["damaged lines"] += 1
    check_file(tmp_path / "data.jsonl")


@tries(150)
@given(
    content=st.binary(max_size=200) | st.binary(max_size=60).map(b"[".__add__) | DAMAGED.map(gzip.compress)
)
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    for name in ("data.jsonl", "data.json.gz"):
        (tmp_path / name).write_bytes(content)
        TRIED["any bytes"] += 1
        check_file(tmp_path / name)


@tries(100)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_archives(place: int, value: int, cut: bool, tmp_path: Path) -> None:
    content = bytearray(
        gzip.compress(b"\n".join(GOOD.replace(b'"\xc3\xbc"', b'"%d"' % n) for n in range(50)))
    )
    place %= len(content)
    content[place] = value
    (tmp_path / "data.jsonl.gz").write_bytes(content[:place] if cut else content)
    TRIED["damaged archives"] += 1
    check_file(tmp_path / "data.jsonl.gz")


@tries(60)
@given(content=DAMAGED)
def test_damaged_parquet(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    table = pyarrow.Table.from_pylist([json.loads(GOOD) | {"id": str(n)} for n in range(20)])
    pyarrow.parquet.write_table(table, path)
    whole = bytearray(path.read_bytes())
    place = sum(content) * 7919 % len(whole)
    whole[place : place + len(content) % 5 + 1] = content[:3]
    path.write_bytes(whole)
    TRIED["damaged Parquet"] += 1
    check_file(path)


@tries(500)
@given(record=RECORDS | VALUES)
def test_any_record(record: Any) -> None:
    TRIED["records"] += 1
    try:
        check_group(group_from_record(record, "data.jsonl:1"))
    except RecordError as error:
        check_message(error, "data.jsonl:1: ")


TOKENIZERS = {
    template: GroupTokenizer(make_tokenizer(template), OPTIONS) for template in (CHATML, LLAMA2, None)
}


@tries(150)
@given(records=st.lists(RECORDS, max_size=4), template=st.sampled_from([CHATML, LLAMA2, None]))
def test_any_record_through_the_tokenizer(records: list[Any], template: str | None, tmp_path: Path) -> None:
    """As lines of a file, so what JSON cannot say is said in another way."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    TRIED["records through a tokenizer"] += len(records)
    check_file(path)
    faults: list[RecordError] = []

    def skip(error: RecordError) -> bool:
        check_message(error, f"{path}:")
        faults.append(error)
        return True

    groups = list(read_groups(path, on_fault=skip))
    tokens = TOKENIZERS[template](groups, skip)
    assert len(groups) == len(tokens)
    assert len(faults) + sum(of is not None for of in tokens) == len(records)
    for of in tokens:
        if of is not None:
            assert 1 <= len(of.prompt_ids) <= 60
            assert all(1 <= len(ids) <= 100 - len(of.prompt_ids) for ids in of.response_ids)


@tries(200)
@given(
    depth=st.integers(1, 3000),
    opening=st.sampled_from(["[", '{"a":']),
    key=st.sampled_from(["prompt", "responses", "id", "x"]),
)
def test_any_depth(depth: int, opening: str, key: str, tmp_path: Path) -> None:
    nested = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    path = tmp_path / "data.jsonl"
    path.write_text(f'{GOOD.decode()[:-1]}, "{key}": {nested}}}\n', encoding="utf-8")
    TRIED["depths"] += 1
    check_file(path)
