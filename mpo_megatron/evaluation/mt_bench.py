"""MT-Bench (Zheng et al., 2023, arXiv:2306.05685): questions of two turns, and the lines of a model_answer file.

A question is a line {"question_id", "category", "turns"} of FastChat's question.jsonl. The second turn is asked of the
conversation with the model's own first answer in it, so that it is sampled after the first: `second_turns` makes the
prompts of it from the first answers, and a file of second answers holds all of the conversation.
"""

from collections.abc import Sequence
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation.questions import Question, first_answers
from mpo_megatron.rollout.parts import digest_of
from mpo_megatron.rollout.records import Record

FIELDS = {"question_id": int, "category": str, "turns": list}
# Those of FastChat's llm_judge/common.py; other categories have 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7


def first_turns(questions: Sequence[Question]) -> list[Record]:
    """A record for tools/generate.py of each first turn, with its category's temperature.

    Raises UserError for a question that does not have two turns.
    """
    return [_record(question, 1, _turns(question)[0]) for question in questions]


def second_turns(questions: Sequence[Question], groups: Sequence[Record]) -> list[Record]:
    """A record of each second turn, whose prompt is the conversation so far.

    Args:
        groups: the answers to `first_turns`.

    Raises UserError if one is missing or empty.
    """
    answers = first_answers(first_turns(questions), groups)
    return [
        _record(question, 2, _conversation(question, answer))
        for question, answer in zip(questions, answers, strict=True)
    ]


def answers(
    questions: Sequence[Question], groups: Sequence[Record], model: str, time: float
) -> list[dict[str, Any]]:
    """The lines of model_answer/MODEL.jsonl, in the order of their question_id.

    Args:
        groups: the answers to `second_turns`.
        time: seconds since 1970 at which they were sampled.

    Raises UserError if one is missing, or for a question that does not have two turns.
    """
    said = {group["id"]: group["prompt"] for group in groups}
    asked = []
    for question in questions:
        prompt = said.get(f"{question['question_id']}-2")
        # Otherwise `first_answers` says what is wrong with it.
        first = prompt[1]["content"] if isinstance(prompt, list) and len(prompt) == 3 else ""
        asked.append((first, _record(question, 2, _conversation(question, first))))
    second = first_answers([record for _, record in asked], groups)
    lines = []
    for question, (first, _), last in zip(questions, asked, second, strict=True):
        name = question["question_id"]
        lines.append(
            {
                "question_id": name,
                "answer_id": digest_of([model, name, first, last]),
                "model_id": model,
                "choices": [{"index": 0, "turns": [first, last]}],
                "tstamp": time,
            }
        )
    return sorted(lines, key=lambda line: line["question_id"])


def _record(question: Question, turn: int, prompt: Any) -> Record:
    temperature = TEMPERATURES.get(question["category"], _OTHER_TEMPERATURE)
    return {"id": f"{question['question_id']}-{turn}", "prompt": prompt, "temperature": temperature}


def _conversation(question: Question, answer: str) -> list[dict[str, str]]:
    first, second = _turns(question)
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]


def _turns(question: Question) -> list[str]:
    said: list[str] = question["turns"]
    if len(said) != 2 or not all(isinstance(text, str) and text.strip() for text in said):
        raise UserError(f"question {question['question_id']} has turns={said!r}; it needs two texts")
    return said
