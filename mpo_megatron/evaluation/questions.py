"""A benchmark's questions, and the sampled answers to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.data.readers import read_records
from mpo_megatron.errors import UserError
from mpo_megatron.rollout.records import Record, check_readable

Question = dict[str, Any]


def read_questions(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[Question]:
    """The questions of a JSON list or a JSONL file, each with `fields` of these types and no empty text.

    Raises UserError, with the place in the file.
    """
    questions = []
    for where, question in read_records(path):
        if not isinstance(question, dict):
            raise UserError(f"{where}: found {type(question).__name__}; a question must be a JSON object")
        for name, kind in fields.items():
            value = question.get(name)
            if not isinstance(value, kind) or value == "":
                needed = ", ".join(fields)
                raise UserError(
                    f"{where}: {name}={value!r}; a question of this benchmark has {needed}: give its own file"
                )
        check_readable(question, where)
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def first_answers(prompts: Sequence[Record], groups: Sequence[Record]) -> list[str]:
    """The first response to each prompt, without white space around it; it is the one that a single sample would be.

    Raises UserError for a prompt that no group answers, or answers in other words.
    """
    by_id = {group["id"]: group for group in groups}
    answers = []
    for prompt in prompts:
        group = by_id.get(prompt["id"])
        if group is None or group["prompt"] != prompt["prompt"]:
            problem = "is not among the answers" if group is None else "was asked in other words"
            raise UserError(
                f"question {prompt['id']!r} {problem}; sample the prompts that tools/evaluate.py makes of this file"
            )
        answers.append(group["responses"][0]["text"].strip())
    return answers
