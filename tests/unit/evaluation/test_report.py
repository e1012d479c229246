"""Two models' scored answers: what belongs together, and the figures of hand-made ones."""

import json

import pytest
from scipy import special, stats

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation.pairs import check_comparable, joined, matched, parted, read_scored
from mpo_megatron.evaluation.report import report
from mpo_megatron.rollout.records import write_jsonl


def group(name: str, *responses: tuple[float, str]) -> dict:
    return {
        "id": name,
        "prompt": f"Say {name}.",
        "responses": [{"text": text, "finish_reason": "stop", "score": score} for score, text in responses],
    }


BASE = [group("a", (1, "one"), (2, "twooo")), group("b", (4, "four")), group("c", (3, ""))]
TRAINED = [group("c", (5, "five")), group("a", (2, "x")), group("b", (3, "yy"), (4, "zzzz"), (6, "u"))]


def test_figures_of_three_prompts():
    found = report(matched(BASE, TRAINED))
    assert found.prompts == 3
    assert found.reward.base.value == pytest.approx((1.5 + 4 + 3) / 3)
    assert found.reward.trained.value == pytest.approx((2 + 13 / 3 + 5) / 3)
    differences = [0.5, 1 / 3, 2]
    ends = stats.t.interval(0.95, 2, loc=found.reward.difference.value, scale=stats.sem(differences))
    assert found.reward.difference.value == pytest.approx(sum(differences) / 3)
    assert (found.reward.difference.low, found.reward.difference.high) == pytest.approx(ends)
    assert found.characters.base.value == pytest.approx((4 + 4 + 0) / 3)
    assert found.characters.difference.value == pytest.approx((-3 + (7 / 3 - 4) + 4) / 3)
    # a: won and drawn; b: lost, drawn and won; c: won.
    assert found.win_rate.value == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert (found.base_finished_share, found.trained_finished_share) == (1, 1)
    found = report(matched(BASE, TRAINED), bradley_terry=True)
    logits = [[1, 0], [-1, 0, 2], [2]]
    assert found.win_rate.value == pytest.approx(sum(special.expit(own).mean() for own in logits) / 3)


def test_a_single_prompt_has_figures_without_intervals():
    found = report(matched(BASE[:1], TRAINED[1:2]))
    assert (found.reward.difference.value, found.reward.difference.low) == (0.5, None)
    assert found.win_rate.value == pytest.approx(0.75)
    assert found.win_rate.low is None


def test_together_and_apart_again(tmp_path):
    pairs = matched(BASE, TRAINED)
    groups = joined(pairs)
    assert [response["model"] for response in groups[1]["responses"]] == ["base"] + 3 * ["trained"]
    write_jsonl(tmp_path / "both.jsonl", groups)
    assert report(parted(read_scored(tmp_path / "both.jsonl"))) == report(pairs)
    with pytest.raises(UserError, match=r"group 'a' does not hold the answers of both models; make it with"):
        parted(BASE)
    groups[1]["responses"].append({"text": "?", "score": 1, "model": "third"})
    with pytest.raises(UserError, match="group 'b' does not hold"):
        parted(groups)


def test_files_that_do_not_belong_together():
    with pytest.raises(UserError, match=r"hold different prompts, first 'a'; sample both from the same file"):
        matched(BASE[1:], TRAINED)
    with pytest.raises(UserError, match="prompt 'b' has other words in the two files"):
        matched([BASE[0], BASE[1] | {"prompt": "?"}, BASE[2]], TRAINED)


@pytest.mark.parametrize("score", [None, True, "5", float("nan")])
def test_a_score_is_a_number(tmp_path, score):
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps(group("a", (1, "x"), (score, "y"))) + "\n")
    with pytest.raises(
        UserError, match=r"groups\.jsonl: group 'a' has a response with score=.*; score the file"
    ):
        read_scored(path)


def test_scores_of_a_pair_ranker_are_no_scores_of_two_files():
    relative = [group("a", (0.3, "x"), (-0.3, "y")), group("b", (0.1, "x"), (0.2, "y"), (-0.3, "z"))]
    with pytest.raises(UserError, match="sum to 0, as those of a pair ranker"):
        check_comparable(matched(relative, relative))
    check_comparable(matched(relative, [relative[0], group("b", (0.2, "x"))]))
    check_comparable(matched(BASE, TRAINED))
