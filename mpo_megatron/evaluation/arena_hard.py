"""Arena-Hard (Li et al., 2024, arXiv:2406.11939), v0.1 and v2.0: prompts, and the lines of a model_answer file.

A question is a line {"uid", "prompt", ...} of question.jsonl as arena-hard-auto has it. An answer's "metadata" is what
its style control goes by: tokens of GPT-4o's tokenizer, and counts of Markdown outside of code.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation.questions import Question, first_answers
from mpo_megatron.rollout.parts import digest_of
from mpo_megatron.rollout.records import Record

FIELDS = {"uid": str, "prompt": str}
TOKENIZER_OF = "gpt-4o"

_CODE = re.compile(r"```([^`]*)```")
_MARKDOWN = {
    "header_count": {f"h{level}": rf"^{'#' * level}\s" for level in range(1, 7)},
    "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
    "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
}


def prompts(questions: Sequence[Question]) -> list[Record]:
    """A record for tools/generate.py of each question."""
    return [{"id": question["uid"], "prompt": question["prompt"]} for question in questions]


def answers(
    questions: Sequence[Question],
    groups: Sequence[Record],
    model: str,
    time: float,
    count_tokens: Callable[[str], int] | None,
) -> list[dict[str, Any]]:
    """The lines of model_answer/MODEL.jsonl, in the order of their uid, as gen_answer.py leaves them.

    Args:
        time: seconds since 1970 at which they were sampled.
        count_tokens: None leaves "metadata" out.

    Raises UserError if an answer is missing.
    """
    lines = []
    for question, text in zip(questions, first_answers(prompts(questions), groups), strict=True):
        line = {
            "uid": question["uid"],
            "ans_id": digest_of([model, question["uid"], text]),
            "model": model,
            "messages": [
                {"role": "user", "content": question["prompt"]},
                {"role": "assistant", "content": {"answer": text}},
            ],
            "tstamp": time,
        }
        if count_tokens is not None:
            line["metadata"] = {"token_len": count_tokens(text)} | markdown_counts(text)
        lines.append(line)
    return sorted(lines, key=lambda line: line["uid"])


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headers by level, list items and bold pieces of `text`, where what stands between fences does not count.

    As their add_markdown_info.py counts: the text of a block of code is taken out wherever it stands.
    """
    for code in _CODE.findall(text):
        text = text.replace(code, "")
    return {
        name: {kind: len(re.findall(pattern, text, re.MULTILINE)) for kind, pattern in patterns.items()}
        for name, patterns in _MARKDOWN.items()
    }


def token_counter() -> Callable[[str], int]:
    """Counts tokens as arena-hard-auto does.

    Raises UserError where tiktoken is not installed, or cannot get the vocabulary, which it fetches once.
    """
    without = "or give --without-style (their utils/add_markdown_info.py adds it afterwards)"
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise UserError(
            f"the answers' style data needs tiktoken: pip install 'mpo-megatron[eval]', {without}"
        ) from None
    try:
        encoding = tiktoken.encoding_for_model(TOKENIZER_OF)
    # Of requests, or of files; they have no base in common.
    except Exception as error:
        raise UserError(
            f"tiktoken cannot get the vocabulary of {TOKENIZER_OF} ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to "
            f"a folder in which a machine with network access has put it, {without}"
        ) from error
    return lambda text: len(encoding.encode_ordinary(text))
