"""AlpacaEval 2 (Dubois et al., 2024, arXiv:2404.04475): instructions, and the list of outputs that `alpaca_eval` reads.

A question is an object with "instruction", as in the JSON lists of the dataset tatsu-lab/alpaca_eval; "dataset" and
"datasplit" are handed on. The instructions have no names of their own: a prompt's id is the place in the list.
"""

from collections.abc import Sequence
from typing import Any

from mpo_megatron.evaluation.questions import Question, first_answers
from mpo_megatron.rollout.records import Record

FIELDS = {"instruction": str}
_HANDED_ON = ("dataset", "datasplit", "instruction")


def prompts(questions: Sequence[Question]) -> list[Record]:
    """A record for tools/generate.py of each instruction."""
    return [
        {"id": f"alpaca_eval-{number}", "prompt": question["instruction"]}
        for number, question in enumerate(questions)
    ]


def outputs(questions: Sequence[Question], groups: Sequence[Record], model: str) -> list[dict[str, Any]]:
    """What `alpaca_eval --model_outputs` reads, in the order of the questions.

    Raises UserError if an answer is missing.
    """
    answers = first_answers(prompts(questions), groups)
    return [
        {name: question[name] for name in _HANDED_ON if name in question}
        | {"output": answer, "generator": model}
        for question, answer in zip(questions, answers, strict=True)
    ]
