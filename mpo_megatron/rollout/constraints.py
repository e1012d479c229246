"""Verifiable constraints: what a prompt asks of the form of its answer, graded by plain code.

A constraint is a record such as ``{"type": "max_words", "limit": 25}``: the type names a rule below, the other keys
are its parameters. `satisfaction` maps (response text, constraint) to [0, 1]: 1 when it holds, and below that how far
off the text is, so that two answers that both miss can still be told apart. The rules follow the kinds of IFEval
(Zhou et al., 2023, arXiv:2311.07911), which are pass or fail there.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.text import WORD, paragraphs, sentences, words

Constraint = Mapping[str, Any]

_RULES: dict[str, Callable[..., float]] = {}
_BULLET = re.compile(r"^\s*[-*•+]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)
_CLOSERS = "\"'”’)*_` "


def satisfaction(text: str, constraint: Constraint) -> float:
    """How well `text` meets `constraint`, in [0, 1]; raises UserError (a ValueError) as `check_constraint` does."""
    check_constraint(constraint)
    parameters = {name: value for name, value in constraint.items() if name != "type"}
    return _RULES[constraint["type"]](text.strip(), **parameters)


def check_constraint(constraint: Constraint) -> None:
    """Raises UserError, naming the value, the rule and the fix, unless type and parameters fit a rule."""
    if not isinstance(constraint, Mapping) or not isinstance(constraint.get("type"), str):
        raise UserError(
            f'constraint {constraint!r} must be a record with a "type"; e.g. {{"type": "no_commas"}}'
        )
    kind = constraint["type"]
    if kind not in _RULES:
        raise UserError(f"constraint type {kind!r} is unknown; use one of {', '.join(sorted(_RULES))}")
    expected = list(inspect.signature(_RULES[kind]).parameters.values())[1:]
    given = {name: value for name, value in constraint.items() if name != "type"}
    usage = ", ".join(_describe(p) for p in expected) or "no parameters"
    for name in given:
        if name not in {p.name for p in expected}:
            raise UserError(f"constraint {kind!r} does not know the parameter {name!r}; it takes {usage}")
    for parameter in expected:
        if parameter.name not in given:
            if parameter.default is inspect.Parameter.empty:
                raise UserError(
                    f"constraint {kind!r} lacks the parameter {parameter.name!r}; it takes {usage}"
                )
        elif not _fits(given[parameter.name], parameter.annotation):
            raise UserError(
                f"constraint {kind!r} has {parameter.name}={given[parameter.name]!r}; it takes {usage}"
            )
    if kind == "word_range" and given["minimum"] > given["maximum"]:
        raise UserError(
            f"constraint 'word_range' has minimum={given['minimum']} above maximum={given['maximum']}; swap them"
        )


def constraint_types() -> list[str]:
    """The names that a constraint's "type" may have, sorted."""
    return sorted(_RULES)


def _fits(value: object, annotation: object) -> bool:
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if annotation is str:
        return isinstance(value, str) and bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value)


def _describe(parameter: inspect.Parameter) -> str:
    kinds = {int: "a whole number of at least 1", str: "a text that is not empty"}
    kind = kinds.get(parameter.annotation, "a list of texts")
    optional = "" if parameter.default is inspect.Parameter.empty else ", optional"
    return f"{parameter.name} ({kind}{optional})"


def _rule(function: Callable[..., float]) -> Callable[..., float]:
    """Registers a rule under its own name; its keyword parameters are the constraint's parameters."""
    _RULES[function.__name__] = function
    return function


# How far off a count is. The square makes a small miss cost something: 30 words where 25 are allowed is 0.70.
def _at_most(count: int, limit: int) -> float:
    return 1.0 if count <= limit else ((limit + 1) / (count + 1)) ** 2


def _at_least(count: int, minimum: int) -> float:
    return min(1.0, count / minimum)


def _exactly(count: int, target: int) -> float:
    return (min(count, target) / max(count, target)) ** 2


def _none(count: int) -> float:
    return 1 / (1 + count)


def _occurrences(text: str, phrase: str) -> int:
    """Whole-word occurrences of a word or phrase, whatever the case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text.lower()))


def _has_word(text: str, word: str) -> float:
    """1 for the word itself, 0.5 where only another form of it occurs ("sunny" or "sunlight" for "sun")."""
    if _occurrences(text, word):
        return 1.0
    stem = word.lower()[: max(3, len(word) - 2)]
    return 0.5 if any(other.startswith(stem) for other in words(text)) else 0.0


# Length


@_rule
def max_words(text: str, limit: int) -> float:
    return _at_most(len(words(text)), limit)


@_rule
def min_words(text: str, minimum: int) -> float:
    return _at_least(len(words(text)), minimum)


@_rule
def word_range(text: str, minimum: int, maximum: int) -> float:
    count = len(words(text))
    return min(_at_most(count, maximum), _at_least(count, minimum))


@_rule
def max_sentences(text: str, limit: int) -> float:
    return _at_most(len(sentences(text)), limit)


@_rule
def sentence_count(text: str, count: int) -> float:
    return _exactly(len(sentences(text)), count)


@_rule
def short_sentences(text: str, limit: int) -> float:
    """No sentence with more than `limit` words: the mean over the sentences."""
    found = sentences(text)
    return sum(_at_most(len(words(sentence)), limit) for sentence in found) / max(1, len(found))


@_rule
def paragraph_count(text: str, count: int) -> float:
    return _exactly(len(paragraphs(text)), count)


# Words and characters


@_rule
def include_word(text: str, word: str) -> float:
    return _has_word(text, word)


@_rule
def include_words(text: str, words: list[str]) -> float:
    """The share of `words` that occur."""
    return sum(_has_word(text, word) for word in words) / len(words)


@_rule
def avoid_word(text: str, word: str) -> float:
    return _none(_occurrences(text, word))


@_rule
def avoid_words(text: str, words: list[str]) -> float:
    return _none(sum(_occurrences(text, word) for word in words))


@_rule
def no_commas(text: str) -> float:
    return _none(text.count(","))


@_rule
def no_digits(text: str) -> float:
    return _none(len(re.findall(r"\d+", text)))


@_rule
def has_number(text: str) -> float:
    """A number in figures; half for one spelled out."""
    spelled = r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|million)\b"
    return 1.0 if re.search(r"\d", text) else 0.5 if re.search(spelled, text.lower()) else 0.0


@_rule
def exclamation_count(text: str, count: int) -> float:
    return _exactly(text.count("!"), count)


@_rule
def all_lowercase(text: str) -> float:
    return _none(sum(word != word.lower() for word in WORD.findall(text)))


@_rule
def all_uppercase(text: str) -> float:
    """The share of words in capitals."""
    found = [word for word in WORD.findall(text) if not word.isdigit()]
    return sum(word == word.upper() for word in found) / max(1, len(found))


# Beginning and end


@_rule
def start_with_phrase(text: str, phrase: str) -> float:
    """Begins with `phrase` (quotation marks before it are let pass); later in the text, at most 0.6."""
    place = text.lower().find(phrase.lower())
    if place < 0:
        return 0.0
    return 1.0 if not text[:place].strip("\"'“‘*_# ") else 0.6 * (1 - place / len(text))


@_rule
def end_with_phrase(text: str, phrase: str) -> float:
    """Ends with `phrase` (final punctuation does not matter); earlier in the text, at most 0.6."""
    bare = phrase.lower().rstrip(".!?")
    end = text.lower().rfind(bare) + len(bare)
    if end < len(bare):
        return 0.0
    return 1.0 if not text[end:].strip(".!?" + _CLOSERS) else 0.6 * end / len(text)


@_rule
def end_with_question(text: str) -> float:
    """The last sentence is a question; a question earlier in the text is worth more the later it stands, up to 0.5."""
    bare = text.rstrip(_CLOSERS)
    return 1.0 if bare.endswith("?") else 0.5 * (bare.rfind("?") + 1) / max(1, len(bare))


@_rule
def quoted(text: str) -> float:
    """The whole text stands in double quotation marks; 0.4 for either mark alone, 0.2 for a quotation inside."""
    ends = (text[:1] in ('"', "“")) + (len(text) > 1 and text[-1] in ('"', "”"))
    inside = 0.2 if re.search(r"[\"“][^\"”]+[\"”]", text) else 0.0
    return (inside, 0.4, 1.0)[ends]


@_rule
def postscript(text: str) -> float:
    """The last paragraph or line begins with "P.S."; 0.5 where the letters stand elsewhere."""
    lines = [line.strip(_CLOSERS) for line in text.splitlines() if line.strip()]
    if lines and re.match(r"p\.?\s?s\b", lines[-1].lower()):
        return 1.0
    return 0.5 if re.search(r"\bp\.?s\.", text.lower()) else 0.0


# Shape


@_rule
def bullet_count(text: str, count: int) -> float:
    """So many lines that begin with a bullet; numbered lines count at half."""
    bullets = len(_BULLET.findall(text))
    return _exactly(bullets, count) if bullets else 0.5 * _exactly(len(_NUMBERED.findall(text)), count)


@_rule
def numbered_list_count(text: str, count: int) -> float:
    """So many lines that begin with "1.", "2)" ...; bullets count at half."""
    numbered = len(_NUMBERED.findall(text))
    return _exactly(numbered, count) if numbered else 0.5 * _exactly(len(_BULLET.findall(text)), count)


@_rule
def comma_list_count(text: str, count: int) -> float:
    """One line of so many short items (at most four words each) between commas."""
    items = [item for item in text.split(",") if WORD.search(item)]
    short = sum(len(words(item)) <= 4 for item in items) / max(1, len(items))
    return _exactly(len(items), count) * short / max(1, len(text.splitlines()))


@_rule
def title_line(text: str) -> float:
    """The first line is a title: at most ten words, no full stop at its end, more text below; 0.5 for a title alone."""
    first, _, rest = text.partition("\n")
    is_title = 0 < len(words(first)) <= 10 and first.rstrip(_CLOSERS)[-1:] not in (".", ",", ";")
    return (
        (1.0 if WORD.search(rest) else 0.0 if first.rstrip(_CLOSERS)[-1:] in "?!" else 0.5)
        if is_title
        else 0.0
    )


@_rule
def json_only(text: str, keys: list[str] | None = None) -> float:
    """A JSON object with `keys` and nothing around it.

    Half for being valid JSON (0.25 if other text stands around it), half for the share of keys that it has; for text
    that does not parse, 0.3 x the share of keys that stand in it in quotation marks.
    """
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except json.JSONDecodeError:
        value = None
    names = keys or []
    if not isinstance(value, dict) or not value:
        return 0.3 * sum(f'"{name}"' in text for name in names) / max(1, len(names))
    share = sum(name in value for name in names) / len(names) if names else 1.0
    alone = start == 0 and end == len(text) - 1
    return (0.5 if alone else 0.25) + 0.5 * share
