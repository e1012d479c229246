"""Whatever lies in a benchmark's file of questions: prompts and answers that can be written, or one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation import alpaca_eval, arena_hard, mt_bench
from mpo_megatron.evaluation.questions import read_questions
from mpo_megatron.rollout.records import Record, write_jsonl
from tests.helpers.fuzzing import SCALARS, TEXT, TRIED, changed, check_message, tries

pytestmark = pytest.mark.usefixtures("inputs_are_counted")


ALPACA = {"instruction": "Name a colour.", "dataset": "koala", "datasplit": "eval"}
ARENA = {"uid": "b7", "category": "hard_prompt", "prompt": "Write a loop."}
MT = {"question_id": 101, "category": "math", "turns": ["What is 1 + 1?", "And twice that?"]}
VALUES = TEXT | SCALARS | st.lists(TEXT | SCALARS, max_size=3) | st.dictionaries(TEXT, SCALARS, max_size=2)


def answered(prompts: list[Record]) -> list[Record]:
    return [prompt | {"responses": [{"text": "Two.", "finish_reason": "stop"}]} for prompt in prompts]


def of_alpaca(questions: list[Any]) -> tuple[list[Record], list[Any]]:
    prompts = alpaca_eval.prompts(questions)
    return prompts, alpaca_eval.outputs(questions, answered(prompts), "mine")


def of_arena(questions: list[Any]) -> tuple[list[Record], list[Any]]:
    prompts = arena_hard.prompts(questions)
    return prompts, arena_hard.answers(questions, answered(prompts), "mine", 0.0, len)


def of_mt_bench(questions: list[Any]) -> tuple[list[Record], list[Any]]:
    first = mt_bench.first_turns(questions)
    second = mt_bench.second_turns(questions, answered(first))
    return [*first, *second], mt_bench.answers(questions, answered(second), "mine", 0.0)


@pytest.mark.parametrize(
    ("question", "benchmark", "exports"),
    [(ALPACA, alpaca_eval, of_alpaca), (ARENA, arena_hard, of_arena), (MT, mt_bench, of_mt_bench)],
    ids=["alpaca", "arena", "mt-bench"],
)
@tries(80)
@given(data=st.data())
def test_any_question(question: Any, benchmark: Any, exports: Any, data: Any, tmp_path: Path) -> None:
    spoilt = data.draw(changed(question, VALUES))
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (spoilt, question)))
    try:
        prompts, answers = exports(read_questions(path, benchmark.FIELDS))
    except UserError as error:
        check_message(error)
        TRIED["refused"] += 1
        return
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    write_jsonl(tmp_path / "answers.jsonl", answers)
    assert len(answers) == 2
    TRIED["taken"] += 1


@pytest.mark.parametrize("turns", [[], ["one"], ["one", "two", "three"], ["one", 2], ["one", " "]])
def test_a_question_without_two_turns(turns: list[Any]) -> None:
    questions = [MT | {"turns": turns}]
    with pytest.raises(UserError, match=r"question 101 has turns=.*; it needs two texts"):
        mt_bench.first_turns(questions)
    with pytest.raises(UserError, match=r"question 101 has turns=.*; it needs two texts"):
        mt_bench.answers(questions, [], "mine", 0.0)
