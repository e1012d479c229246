"""Scored answers of two models to the same prompts, in two files or together in one.

Together means that a group holds the responses of both, each with "model": "base" or "trained". A pair ranker must see
them so, as its scores say nothing across groups.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from mpo_megatron.data.schema import LARGEST_SCORE
from mpo_megatron.errors import UserError
from mpo_megatron.rollout.records import Record, read_groups

BASE, TRAINED = "base", "trained"
# The base model's group and the trained one's, of the same prompt.
Pair = tuple[Record, Record]


def read_scored(path: Path) -> list[Record]:
    """The groups of a file that tools/score.py wrote; raises UserError if a response has no score."""
    groups = read_groups(path, constraints=False)
    for group in groups:
        for response in group["responses"]:
            score = response.get("score")
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            if not is_number or not abs(score) <= LARGEST_SCORE:
                raise UserError(
                    f"{path}: group {group['id']!r} has a response with score={score!r}; score the file with "
                    "tools/score.py first"
                )
    return groups


def matched(base: Sequence[Record], trained: Sequence[Record]) -> list[Pair]:
    """The groups of each prompt, in the order of `base`.

    Raises UserError unless both hold the same prompts.
    """
    by_id = {group["id"]: group for group in trained}
    if by_id.keys() != {group["id"] for group in base}:
        missing = sorted(by_id.keys() ^ {group["id"] for group in base})
        raise UserError(
            f"the two files hold different prompts, first {missing[0]!r}; sample both from the same file"
        )
    for group in base:
        if by_id[group["id"]]["prompt"] != group["prompt"]:
            raise UserError(
                f"prompt {group['id']!r} has other words in the two files; sample both from the same file"
            )
    return [(group, by_id[group["id"]]) for group in base]


def joined(pairs: Sequence[Pair]) -> list[Record]:
    """Both models' responses in a group each."""
    return [
        base
        | {
            "responses": [
                response | {"model": model}
                for model, group in ((BASE, base), (TRAINED, trained))
                for response in group["responses"]
            ]
        }
        for base, trained in pairs
    ]


def parted(groups: Sequence[Record]) -> list[Pair]:
    """The pairs that `joined` made one group of each; raises UserError for groups that it did not make."""
    pairs = []
    for group in groups:
        base, trained = (
            [response for response in group["responses"] if response.get("model") == model]
            for model in (BASE, TRAINED)
        )
        if not base or not trained or len(base) + len(trained) < len(group["responses"]):
            raise UserError(
                f"group {group['id']!r} does not hold the answers of both models; make it with tools/evaluate.py join"
            )
        pairs.append((group | {"responses": base}, group | {"responses": trained}))
    return pairs


def check_comparable(pairs: Sequence[Pair]) -> None:
    """Raises UserError if the scores of two files are those of a pair ranker, which sum to 0 in each group."""
    scores = [[response["score"] for response in group["responses"]] for pair in pairs for group in pair]
    if all(abs(math.fsum(group)) <= 1e-9 * max(1.0, *map(abs, group)) for group in scores):
        raise UserError(
            "the scores of every group sum to 0, as those of a pair ranker: they compare the responses of one group, "
            "and not two files; put both models' answers together (tools/evaluate.py join) and score that"
        )
