"""examples/data holds what the README promises."""

import re
from pathlib import Path

import pytest

from mpo_megatron.data import read_groups as read_training_groups
from mpo_megatron.rollout.records import Record, read_groups, read_prompts
from mpo_megatron.rollout.rewards import summarise, verified_score

FOLDER = Path(__file__).parents[3] / "examples" / "data"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Record]]:
    return {name: read_groups(FOLDER / f"{name}.jsonl") for name in ("train", "validation")}


def test_sizes(splits):
    assert len(splits["train"]) >= 300
    assert len(splits["validation"]) >= 60
    assert all(len(group["responses"]) == 4 for groups in splits.values() for group in groups)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3_000_000


def test_splits_share_nothing(splits):
    def plain(group: Record) -> str:
        return re.sub(r"\W+", " ", group["prompt"].lower()).strip()

    for key in (lambda group: group["id"], plain):
        train, validation = ([key(group) for group in splits[name]] for name in ("train", "validation"))
        assert len(set(train) | set(validation)) == len(train) + len(validation)


def test_groups_are_the_prompts(splits):
    prompts = {record["id"]: record for record in read_prompts(FOLDER / "prompts.jsonl")}
    groups = [group for groups in splits.values() for group in groups]
    assert len(prompts) == len(groups)
    for group in groups:
        assert {name: value for name, value in group.items() if name != "responses"} == prompts[group["id"]]


def test_both_splits_ask_for_the_same_kinds_of_things(splits):
    kinds = [
        {c["type"] for group in splits[name] for c in group["constraints"]}
        for name in ("train", "validation")
    ]
    assert kinds[1] <= kinds[0]
    assert len(kinds[1]) >= 15


def test_scoring_again_gives_the_stored_scores(splits):
    for group in splits["train"] + splits["validation"]:
        for response in group["responses"]:
            again = verified_score(
                response["text"],
                group["constraints"],
                prompt=group["prompt"],
                finished=response["finish_reason"] == "stop",
                topic_words=group["topic_words"],
            )
            assert round(again, 3) == response["score"], group["id"]


@pytest.mark.parametrize("name", ["train", "validation"])
def test_enough_groups_can_be_learned_from(splits, name):
    summary = summarise(splits[name])
    assert summary.usable_share >= 0.85
    assert 1 < summary.mean_score < 8  # there is something to improve


@pytest.mark.parametrize("name", ["train", "validation"])
def test_the_training_reader_takes_them(splits, name):
    groups = list(read_training_groups(FOLDER / f"{name}.jsonl"))
    assert [group.id for group in groups] == [group["id"] for group in splits[name]]
    assert [r.score for r in groups[0].responses] == [r["score"] for r in splits[name][0]["responses"]]
