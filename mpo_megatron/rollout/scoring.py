"""Scorers: from the groups of a batch to their scores, one list for each group."""

from collections.abc import Sequence
from typing import Any

from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.rewards import verified_score
from mpo_megatron.rollout.work import Worker


def start_constraints(number: int) -> Worker:
    """The scorer by verifiable constraints (`rewards.verified_score`), rounded to three decimals."""
    return lambda groups: ([_by_constraints(group) for group in groups], 0)


def with_scores(group: Record, scores: Sequence[Any]) -> Record:
    """The group with a "score" in every response."""
    responses = [
        response | {"score": score} for response, score in zip(group["responses"], scores, strict=True)
    ]
    return group | {"responses": responses}


def _by_constraints(group: Record) -> list[float]:
    return [
        round(
            verified_score(
                response["text"],
                group["constraints"],
                prompt=group["prompt"],
                finished=response["finish_reason"] == "stop",
                topic_words=group.get("topic_words", ()),
            ),
            3,
        )
        for response in group["responses"]
    ]
