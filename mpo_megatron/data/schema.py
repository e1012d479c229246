"""What a group is, and how one raw record of a file or dataset becomes one.

A record is a mapping in one of the shapes of `SHAPES`. Each shape has one small function that says where its
prompt and its responses are; the checks afterwards are the same for all. A value of None counts as absent,
since columns of Parquet files hold None where a line of JSON has no such key. Every error names the place in
the data and is one line of bounded length, whatever the record holds.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

from mpo_megatron.errors import UserError

Record = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
LABEL_SCORES = {"preferred": 1.0, "dispreferred": 0.0}
# Objectives take scores in float32.
LARGEST_SCORE = 3.4e38

_SHOWN_KEYS = 10
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def brief(value: Any) -> str:
    """A value for a message: as repr has it, on one line, long ones without their middle."""
    return _repr.repr(value)


class DataError(UserError):
    """The data must change: the sentence names the place, the value found, the rule, and what to do."""


class RecordError(DataError):
    """One record is at fault, and others can be read.

    Args:
        where: the place of the record in the data.
        problem: what is wrong, and what to do.
        fault: a key of `config.FaultConfig`, or "long_prompt".
    """

    def __init__(self, where: str, problem: str, fault: str) -> None:
        super().__init__(where, problem, fault)  # as pickle hands it to other processes
        self.where, self.problem, self.fault = where, problem, fault

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """One answer to a group's prompt with its finite score.

    `finish_reason` "length" says that the sampler's token limit cut the text; anything else that the model
    ended it.
    """

    text: str
    score: float
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A prompt and its n >= 2 scored responses.

    `messages` ends with a user turn; `where` is the place in the data.
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[ScoredResponse, ...]
    where: str


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a shape finds in a record, unchecked: prompt (text or messages) and {"text", "score"} mappings."""

    prompt: Any
    responses: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Shape:
    """A layout of records: it applies where all `keys` are present; `split` finds prompt and responses."""

    keys: tuple[str, ...]
    split: Callable[[Record, str | None, str], _Parts]
    example: str


def group_from_record(record: Record, where: str, prompt_key: str | None = None) -> ScoredGroup:
    """The group that a raw record holds.

    Args:
        record: one line of JSONL or one row of a dataset, in one of `SHAPES`.
        where: the place of the record in the data; begins every error, e.g. "data.jsonl:17".
        prompt_key: the key of the prompt (text or messages); None looks for messages, prompt and instruction.

    Raises:
        RecordError: the record has no known shape or breaks one of its rules.
    """
    try:
        return _group(record, where, prompt_key)
    except RecursionError:  # of values that are nested almost as deep as the reader of JSON goes
        fail(where, "is nested too deep; write one of the known shapes")


def _group(record: Record, where: str, prompt_key: str | None) -> ScoredGroup:
    if not isinstance(record, Mapping):
        fail(where, f"found {_kind(record)}; a record must be an object, e.g. {SHAPES[0].example}")
    shape = next((shape for shape in SHAPES if all(record.get(key) is not None for key in shape.keys)), None)
    if shape is None:
        found = _keys(key for key, value in record.items() if value is not None) or "none"
        known = "; ".join(shape.example for shape in SHAPES)
        fail(where, f"no known shape has the keys found ({found}); write one of: {known}")
    parts = shape.split(record, prompt_key, where)
    count = len(parts.responses)
    if count < 2:
        found = "1 response" if count == 1 else "no responses"
        fail(where, f"the group has {found} and needs at least 2; add some, or leave the record out")
    numbered = enumerate(parts.responses, start=1)
    scored = [_scored(response, f"response {number} of {count}", where) for number, response in numbered]
    if len({by_label for _, by_label in scored}) > 1:
        message = "some responses have a score and others only a label; give all a score, or all a label"
        fail(where, message, "score")
    own_id = _first(record, ("id", "prompt_id"))
    if own_id is not None and not isinstance(own_id, str | Real):
        fail(where, f"the id is {_kind(own_id)}; it must be a text or a number, or left out")
    return ScoredGroup(
        # By default the same wherever the file lies.
        id=readable(str(own_id), "the id", where) if own_id is not None else where.rpartition("/")[2],
        messages=conversation(parts.prompt, where),
        responses=tuple(response for response, _ in scored),
        where=where,
    )


# ---- shapes: where the prompt and the responses are --------------------------------------------------------


def _split_responses(record: Record, prompt_key: str | None, where: str) -> _Parts:
    return _Parts(_prompt(record, prompt_key, where), _objects(record["responses"], "responses", where))


def _split_ultrafeedback(record: Record, prompt_key: str | None, where: str) -> _Parts:
    completions = _objects(record["completions"], "completions", where)
    responses = [
        {
            "text": item.get("response"),
            "score": item.get("overall_score"),
            "finish_reason": item.get("finish_reason"),
        }
        for item in completions
    ]
    return _Parts(_prompt(record, prompt_key, where), responses)


def _split_pair(record: Record, prompt_key: str | None, where: str) -> _Parts:
    """Both sides are texts, or conversations: the last turn is the answer, earlier ones are the prompt."""
    chosen_prompt, chosen = _last_turn(record["chosen"], "chosen", where)
    rejected_prompt, rejected = _last_turn(record["rejected"], "rejected", where)
    if chosen_prompt != rejected_prompt:
        fail(where, "chosen and rejected differ before their last turn; both must answer the same prompt")
    scores = [_first(record, (f"score_{side}", f"{side}_score")) for side in ("chosen", "rejected")]
    if scores == [None, None]:
        scores = [LABEL_SCORES["preferred"], LABEL_SCORES["dispreferred"]]
    responses = [{"text": chosen, "score": scores[0]}, {"text": rejected, "score": scores[1]}]
    return _Parts(chosen_prompt or _prompt(record, prompt_key, where), responses)


def _split_score_lists(record: Record, prompt_key: str | None, where: str) -> _Parts:
    texts, scores = record["all_generated_responses"], record["all_rm_scores"]
    for name, values in (("all_generated_responses", texts), ("all_rm_scores", scores)):
        if not _is_list(values):
            fail(where, f"{name} is {_kind(values)}; it must be a list with one entry per response")
    if len(texts) != len(scores):
        lengths = f"all_generated_responses has {len(texts)} entries and all_rm_scores has {len(scores)}"
        fail(where, f"{lengths}; give every response one score")
    responses = [{"text": text, "score": score} for text, score in zip(texts, scores, strict=True)]
    return _Parts(_prompt(record, prompt_key, where), responses)


SHAPES: tuple[Shape, ...] = (
    Shape(
        ("responses",),
        _split_responses,
        '{"prompt": ..., "responses": [{"text": ..., "score": ...}, ...]} '
        '("messages" for "prompt", "label": "preferred"/"dispreferred" for "score")',
    ),
    Shape(
        ("completions",),
        _split_ultrafeedback,
        '{"instruction": ..., "completions": [{"response": ..., "overall_score": ...}, ...]}',
    ),
    Shape(
        ("all_generated_responses", "all_rm_scores"),
        _split_score_lists,
        '{"prompt": ..., "all_generated_responses": [...], "all_rm_scores": [...]}',
    ),
    Shape(
        ("chosen", "rejected"),
        _split_pair,
        '{"prompt": ..., "chosen": ..., "rejected": ...} (optionally "score_chosen", "score_rejected")',
    ),
)


# ---- checks, the same for every shape ----------------------------------------------------------------------


def _scored(item: Mapping[str, Any], name: str, where: str) -> tuple[ScoredResponse, bool]:
    """The checked response, and whether its score came from a label."""
    text = item.get("text")
    if not isinstance(text, str):
        fail(where, f"{name} has {_kind(text)} for its text; it must be a text")
    if not text.strip():
        fail(where, f"{name} is empty; remove the response, or the record if fewer than 2 remain", "empty")
    readable(text, name, where)
    by_label = item.get("score") is None and item.get("label") is not None
    score = _label_score(item["label"], name, where) if by_label else _finite(item.get("score"), name, where)
    return ScoredResponse(text, score, str(item.get("finish_reason") or "stop")), by_label


def _finite(score: Any, name: str, where: str) -> float:
    if score is None:
        fix = 'add a "score" (a finite number), or a "label" to every response'
        fail(where, f"{name} has no score; {fix}", "score")
    shown = brief(score)
    if isinstance(score, bool) or not isinstance(score, Real):
        fail(
            where,
            f"{name} has score {shown}, {_kind(score)}; scores must be numbers: write it as one",
            "score",
        )
    try:
        value = float(score)
    except OverflowError:  # of an integer
        value = 2 * LARGEST_SCORE
    if not abs(value) < float("inf"):
        fail(
            where,
            f"{name} has score {shown}; scores must be finite numbers: score it again or remove it",
            "score",
        )
    if abs(value) > LARGEST_SCORE:
        fail(where, f"{name} has score {shown}, beyond {LARGEST_SCORE:g}; scale the scores down", "score")
    return value


def _label_score(label: Any, name: str, where: str) -> float:
    if not isinstance(label, str) or label not in LABEL_SCORES:
        fix = 'write "preferred" or "dispreferred", or a numeric "score"'
        fail(where, f"{name} has label {brief(label)}; {fix}", "score")
    return LABEL_SCORES[label]


def readable(text: str, name: str, where: str) -> str:
    """The text, if it can be written as UTF-8: JSON may hold halves of characters, and no tokenizer takes them.

    Raises RecordError if not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}, half of a character, at {error.start}"
        fail(where, f"{name} has {half}; write the character whole, or remove it", "unreadable")
    return text


def conversation(prompt: Any, where: str) -> tuple[Message, ...]:
    """The turns of a prompt: a text is one user turn.

    Raises RecordError unless a list of {"role", "content"} has known roles and ends with a user turn that is not empty.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = _objects(prompt, "the prompt", where)
    if not turns:
        fail(where, "the prompt has no messages; give it at least one user turn")
    messages = []
    for number, turn in enumerate(turns, start=1):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            found = f"message {number} of the prompt has role {brief(role)}"
            fail(where, f"{found}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            fail(where, f"message {number} of the prompt has {_kind(content)} for content; it must be a text")
        messages.append(Message(role, readable(content, f"message {number} of the prompt", where)))
    if messages[-1].role != "user":
        found = f"the last message of the prompt has role {messages[-1].role!r}"
        fail(where, f"{found}; a prompt must end with a user turn: move an answer to the responses")
    if not messages[-1].content.strip():
        fail(where, "the prompt is empty; write one or leave the record out", "empty")
    return tuple(messages)


def _prompt(record: Record, prompt_key: str | None, where: str) -> Any:
    keys = (prompt_key,) if prompt_key else ("messages", "prompt", "instruction")
    prompt = _first(record, keys)
    if prompt is None:
        problem = (
            "there is no prompt" if prompt_key is None else f"there is no prompt_key={brief(prompt_key)}"
        )
        fix = "add the prompt, as a text or a list of messages, or set prompt_key to the key that holds it"
        fail(where, f"{problem} among the keys ({_keys(record)}); {fix}")
    return prompt


def _last_turn(side: Any, name: str, where: str) -> tuple[list[Mapping[str, Any]], Any]:
    """Earlier turns (none for a plain text) and the text of the answer."""
    if isinstance(side, str):
        return [], side
    turns = _objects(side, name, where)
    if not turns or turns[-1].get("role") != "assistant":
        role = turns[-1].get("role") if turns else None
        fail(where, f"the last message of {name} has role {brief(role)}; it must be the assistant's answer")
    return list(turns[:-1]), turns[-1].get("content")


def _objects(value: Any, name: str, where: str) -> Sequence[Mapping[str, Any]]:
    if not _is_list(value) or not all(isinstance(item, Mapping) for item in value):
        fail(where, f"{name} is {_kind(value)}; it must be a list of objects")
    objects: Sequence[Mapping[str, Any]] = value
    return objects


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _first(record: Record, keys: Sequence[str], default: Any = None) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), default)


def _kind(value: Any) -> str:
    if _is_list(value):
        inner = sorted({_kind(item) for item in value if not _is_list(item)})
        return f"a list of {' and '.join(inner)}" if inner else "a list"
    names = {str: "a text", bool: "a truth value", int: "a number", float: "a number", type(None): "nothing"}
    return "an object" if isinstance(value, Mapping) else names.get(type(value), f"a {type(value).__name__}")


def _keys(keys: Iterable[str]) -> str:
    """The first of them, for a message."""
    names = list(keys)
    shown = [name if name.isidentifier() and len(name) <= 60 else brief(name) for name in names[:_SHOWN_KEYS]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def fail(where: str, problem: str, fault: str = "shape") -> NoReturn:
    """Raise RecordError for the record at that place."""
    raise RecordError(where, problem, fault)
