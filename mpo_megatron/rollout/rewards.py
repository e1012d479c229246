"""The reward of a response: how well it keeps the prompt's verifiable constraints, unless it is no real answer."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.means import mean_and_error
from mpo_megatron.rollout.constraints import Constraint, satisfaction
from mpo_megatron.rollout.text import words

MAX_SCORE = 10.0
USABLE_SPREAD = 0.5  # best minus worst score from which a group says something about preference

_CONSTRAINT_WEIGHT, _TOPIC_WEIGHT = 0.8, 0.2
_OFF_TOPIC, _UNFINISHED = 0.4, 0.6
_TOPIC_HITS = 2  # topic words from which an answer is fully on topic
_ENOUGH_WORDS = 8  # an answer with fewer words says too little, unless the prompt allows only few


def verified_score(
    text: str,
    constraints: Sequence[Constraint],
    *,
    prompt: str,
    finished: bool,
    topic_words: Sequence[str] = (),
) -> float:
    """The score of a response, in [0, 10].

        score = 10 * (0.8 S + 0.2 C) * substance * topic * repetition * echo * readable * ending

    S           mean satisfaction of the constraints, each in [0, 1] (`constraints.satisfaction`)
    C           topic cover: min(1, topic words in the text / 2); 1 where the prompt names none
    substance   min(1, words / w) with w = 8, or 0.4 x the number of words that the prompt allows if that is less
                (3 at least): an empty or one-word answer keeps every length limit, and must not be worth it
    topic       0.4 if the prompt has topic words and the text none of them, otherwise 1
    repetition  1 - 2 max(0, r - 0.1), r the larger of the shares of repeated word trigrams and repeated lines
    echo        1 - 1.25 max(0, e - 0.2), e the share of the text's runs of four words that stand in the prompt
    readable    min(1, 2a), a the share of letters and digits among the characters that are not white space
    ending      0.6 if the token limit cut the text off (`finished` is False), otherwise 1

    A topic word counts if a word of the text begins with it ("plant" finds "plants").
    Raises UserError for no constraints, or one that `constraints.check_constraint` refuses.
    """
    if not constraints:
        raise UserError(
            "constraints is empty: verified_score needs at least one; give the prompt a constraint"
        )
    kept = statistics.fmean(satisfaction(text, constraint) for constraint in constraints)
    found = words(text)
    hits = sum(any(word.startswith(topic.lower()) for word in found) for topic in topic_words)
    cover = min(1.0, hits / min(_TOPIC_HITS, len(topic_words))) if topic_words else 1.0
    factor = min(1.0, len(found) / _words_needed(constraints))
    factor *= 1.0 if cover > 0 else _OFF_TOPIC
    factor *= max(0.0, 1 - 2 * max(0.0, _repeated_share(text, found) - 0.1))
    factor *= max(0.0, 1 - 1.25 * max(0.0, _echo_share(found, words(prompt)) - 0.2))
    factor *= min(1.0, 2 * _letter_share(text))
    factor *= 1.0 if finished else _UNFINISHED
    return MAX_SCORE * (_CONSTRAINT_WEIGHT * kept + _TOPIC_WEIGHT * cover) * factor


@dataclass(frozen=True)
class Summary:
    """Figures of a set of scored groups; scores in [0, 10]."""

    groups: int
    mean_score: float  # mean over groups of the group's mean
    standard_error: float | None  # of mean_score, over the groups' means; None for a single group
    usable_share: float  # share of groups whose best and worst score are at least USABLE_SPREAD apart
    finished_share: float  # share of responses that ended by themselves


def summarise(groups: Iterable[Mapping[str, Any]]) -> Summary:
    """Summary of groups {"responses": [{"score": float, "finish_reason": "stop" | "length"}, ...]}.

    Raises UserError if there are none, or if a group has no responses.
    """
    scores, finished = [], []
    for group in groups:
        if not group["responses"]:
            raise UserError(f"group {group.get('id')!r} has no responses; sample it again or remove it")
        scores.append([response["score"] for response in group["responses"]])
        finished += [response.get("finish_reason", "stop") == "stop" for response in group["responses"]]
    if not scores:
        raise UserError("no groups to summarise; the input must hold at least one")
    mean, error = mean_and_error([statistics.fmean(group) for group in scores])
    return Summary(
        groups=len(scores),
        mean_score=mean,
        standard_error=error,
        usable_share=statistics.fmean(max(group) - min(group) >= USABLE_SPREAD for group in scores),
        finished_share=statistics.fmean(finished),
    )


def mean_score(group: Mapping[str, Any]) -> float:
    """The mean score of a group's responses."""
    return statistics.fmean(response["score"] for response in group["responses"])


def summarise_by_type(groups: Iterable[Mapping[str, Any]]) -> dict[str, Summary]:
    """`summarise` for each type of constraint, largest first; a group with two types counts under both."""
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for group in groups:
        for kind in {constraint["type"] for constraint in group.get("constraints", ())}:
            by_type.setdefault(kind, []).append(group)
    return {
        kind: summarise(by_type[kind])
        for kind in sorted(by_type, key=lambda kind: (-len(by_type[kind]), kind))
    }


def _words_needed(constraints: Sequence[Constraint]) -> float:
    limits = [
        c.get("limit", c.get("maximum")) for c in constraints if c["type"] in ("max_words", "word_range")
    ]
    return max(3.0, min([_ENOUGH_WORDS] + [0.4 * limit for limit in limits]))


def _repeated_share(text: str, found: Sequence[str]) -> float:
    trigrams = list(zip(found, found[1:], found[2:], strict=False))
    lines = [line.strip().lower() for line in text.splitlines() if line.strip()]
    return max(1 - len(set(items)) / len(items) if items else 0.0 for items in (trigrams, lines))


def _echo_share(found: Sequence[str], asked: Sequence[str]) -> float:
    size = min(4, len(found))
    runs = [tuple(found[i : i + size]) for i in range(len(found) - size + 1)] if size else []
    in_prompt = {tuple(asked[i : i + size]) for i in range(len(asked) - size + 1)}
    return sum(run in in_prompt for run in runs) / max(1, len(runs))


def _letter_share(text: str) -> float:
    visible = [character for character in text if not character.isspace()]
    return sum(character.isalnum() for character in visible) / max(1, len(visible))
