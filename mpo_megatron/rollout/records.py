"""Prompts and groups in the files that tools/generate.py and tools/score.py read and write."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_megatron.data.chat import Turns
from mpo_megatron.data.readers import read_records
from mpo_megatron.data.schema import RecordError, conversation, readable
from mpo_megatron.errors import UserError
from mpo_megatron.finite import is_finite
from mpo_megatron.rollout.constraints import check_constraint

Record = dict[str, Any]


def read_prompts(path: Path) -> list[Record]:
    """The records {"id", "prompt", "temperature"?, "constraints"?, "topic_words"?, "split"?} of a JSONL file, checked.

    The prompt is a text, or a list of turns {"role", "content"} that ends with the user's.

    Raises:
        UserError: the file is missing or empty, a line is broken, lacks a field or has one of the wrong kind, an id
            occurs twice, or a constraint does not exist. It begins with "file:line".
    """
    return _read(path, _check_prompt)


def read_groups(path: Path, *, constraints: bool = True) -> list[Record]:
    """`read_prompts`, each record with "responses": [{"text", "finish_reason", "score"?}, ...], at least one.

    Args:
        constraints: whether each must have "constraints".
    """
    return _read(path, _check_constrained if constraints else _check_group)


def turns(record: Record) -> Turns:
    """The conversation that a record's prompt is."""
    return [asdict(message) for message in conversation(record["prompt"], f"record {record['id']!r}")]


def prompt_text(record: Record) -> str:
    """The prompt as one text: what the user says in a single turn; of several, each with who says it."""
    said = turns(record)
    if len(said) == 1:
        return said[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in said)


def check_readable(record: Record, where: str) -> None:
    """Raise UserError for half a character in any field: all of a record is written again, and UTF-8 cannot say it."""
    for name, value in record.items():
        for text in (name, json.dumps(value, ensure_ascii=False)):
            readable(text, f"the field {name!r}", where)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, under a temporary name first: a run that dies leaves no half file."""
    _write(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value, as `write_jsonl` does."""
    _write(path, [json.dumps(value, ensure_ascii=False, indent=2) + "\n"])


def _write(path: Path, pieces: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path, check: Callable[[object], None]) -> list[Record]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    records: list[Record] = []
    seen: set[str] = set()
    for where, record in read_records(path):
        try:
            check(record)
            if record["id"] in seen:
                raise UserError(f"the id {record['id']!r} occurs twice; give every prompt its own")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        check_readable(record, where)
        seen.add(record["id"])
        records.append(record)
    if not records:
        raise UserError(f"{path}: holds no prompts; write one JSON object a line")
    return records


def _check_prompt(record: object) -> None:
    if not isinstance(record, dict):
        raise UserError(
            f"found {type(record).__name__} where a JSON object is needed; write one {{...}} a line"
        )
    for name in ("id", "prompt"):
        value = record.get(name)
        if name == "prompt" and isinstance(value, list):
            _check_turns(value)
        elif not isinstance(value, str) or not value.strip():
            raise UserError(f"{name}={value!r} must be a text that is not empty; add it")
    temperature = record.get("temperature", 1)
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
        or not is_finite(temperature)
        or temperature < 0
    ):
        raise UserError(f"temperature={temperature!r} must be a number from 0; correct it or leave it out")
    if "constraints" in record:
        _check_constraints(record["constraints"])
    topics = record.get("topic_words", [])
    if not isinstance(topics, list) or not all(isinstance(topic, str) and topic.strip() for topic in topics):
        raise UserError(f"topic_words={topics!r} must be a list of words; correct it or leave it out")


def _check_turns(prompt: list[Any]) -> None:
    try:
        conversation(prompt, "")
    except RecordError as error:
        raise UserError(error.problem) from None


def _check_constraints(constraints: object) -> None:
    if not isinstance(constraints, list) or not constraints:
        raise UserError(f"constraints={constraints!r} must be a list of at least one; add it")
    for constraint in constraints:
        check_constraint(constraint)


def _check_constrained(record: object) -> None:
    _check_group(record)
    assert isinstance(record, dict)
    _check_constraints(record.get("constraints"))


def _check_group(record: object) -> None:
    _check_prompt(record)
    assert isinstance(record, dict)
    responses = record.get("responses")
    if not isinstance(responses, list) or not responses:
        raise UserError("there are no responses; sample them with tools/generate.py first")
    for number, response in enumerate(responses, start=1):
        if not isinstance(response, dict) or not isinstance(response.get("text"), str):
            raise UserError(f"response {number} has no text; sample the group again")
        reason = response.get("finish_reason")
        if reason not in ("stop", "length"):
            raise UserError(f'response {number} has finish_reason={reason!r}; it must be "stop" or "length"')
