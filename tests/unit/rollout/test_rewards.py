import math

import pytest

from mpo_megatron.rollout.rewards import summarise, summarise_by_type, verified_score

PROMPT = "Explain why leaves change colour in autumn in no more than 20 words."
AT_MOST_20 = [{"type": "max_words", "limit": 20}]
TOPICS = ["chlorophyll", "pigment", "sun"]
GOOD = "In autumn trees stop making green chlorophyll, so the red and yellow pigments in their leaves show."


def score(text: str, *, prompt=PROMPT, constraints=AT_MOST_20, finished=True, topic_words=TOPICS) -> float:
    return verified_score(text, constraints, prompt=prompt, finished=finished, topic_words=topic_words)


def test_a_good_answer_gets_the_full_score():
    assert score(GOOD) == 10


def test_the_formula_by_hand():
    # 20 words where 9 are allowed: (10 / 21)^2; one of the two topic words that are needed.
    text = " ".join(f"word{i}" for i in range(19)) + " sunlight"
    kept = (10 / 21) ** 2
    expected = 10 * (0.8 * kept + 0.2 * 0.5)
    assert score(text, constraints=[{"type": "max_words", "limit": 9}]) == pytest.approx(expected)
    assert score(text, constraints=[{"type": "max_words", "limit": 9}], finished=False) == pytest.approx(
        0.6 * expected
    )


def test_constraints_are_averaged():
    one = score(GOOD, constraints=[{"type": "no_commas"}])  # one comma: 1 / 2
    both = score(GOOD, constraints=[{"type": "no_commas"}, *AT_MOST_20])
    assert one == pytest.approx(10 * (0.8 * 0.5 + 0.2))
    assert both == pytest.approx(10 * (0.8 * 0.75 + 0.2))


@pytest.mark.parametrize(
    ("text", "highest"),
    [
        ("", 0),
        (" \n\n ", 0),
        ("!!!", 0),
        ("Chlorophyll.", 1.2),  # one word, where 8 are needed
        ("Chlorophyll pigment sun", 4),  # the topic words alone
        # "sunday" begins with "sun": a known weakness.
        ("I like to eat cake with my friends on a sunday", 10),
        ("I like to eat cake with my friends every weekend", 4),  # keeps the limit, answers nothing
        (PROMPT, 1),  # an echo
        ("Explain why leaves change colour in autumn.", 1),
        ("chlorophyll pigment " * 10, 0.5),  # repetition
        ("Chlorophyll pigment.\n" * 8, 0.5),
        ("�" * 30 + " chlorophyll sun pigment a b c d e", 10),
        ("# $ % & * ( ) chlorophyll @ ! ~ ^ = + [ ] | < > sun ... :: ;; {} {} {} {} {} {} {} {}", 5),
    ],
)
def test_what_is_no_answer_is_not_worth_the_constraint(text, highest):
    assert score(text) <= highest
    assert score(text) <= score(GOOD)


def test_short_limits_ask_for_fewer_words():
    assert score(
        "Falling temperature and less sun", constraints=[{"type": "max_words", "limit": 10}]
    ) == pytest.approx(10 * (0.8 + 0.2 * 0.5))
    assert score("Sun", constraints=[{"type": "max_words", "limit": 5}]) == pytest.approx(10 * 0.9 / 3)


def test_without_topic_words_any_text_is_on_topic():
    assert score("The cat sat on the mat and slept well", topic_words=[]) == 10


def test_always_between_0_and_10_and_never_above_the_unpenalised():
    texts = ["", "a", "a " * 300, GOOD * 9, "é日本🙂" * 40, "x" * 3000, "\n\n\n", '{"a": 1}', PROMPT * 3]
    for text in texts:
        for finished in (True, False):
            assert 0 <= score(text, finished=finished) <= score(text) <= 10


def test_no_or_unknown_constraints_are_refused():
    with pytest.raises(ValueError, match="constraints is empty"):
        score(GOOD, constraints=[])
    with pytest.raises(ValueError, match="'rhymes' is unknown"):
        score(GOOD, constraints=[{"type": "rhymes"}])


def group(*scores: float, kinds: tuple[str, ...] = ("no_commas",), cut: int = 0) -> dict:
    reasons = ["length"] * cut + ["stop"] * (len(scores) - cut)
    responses = [{"score": s, "finish_reason": r} for s, r in zip(scores, reasons, strict=True)]
    return {"id": "x", "constraints": [{"type": kind} for kind in kinds], "responses": responses}


def test_summary_by_hand():
    summary = summarise([group(0, 4), group(8, 8.4, cut=1), group(5, 6)])  # means 2, 8.2, 5.5
    assert summary.groups == 3
    assert summary.mean_score == pytest.approx(15.7 / 3)
    deviations = [mean - 15.7 / 3 for mean in (2, 8.2, 5.5)]
    assert summary.standard_error == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 2 / 3))
    assert summary.usable_share == pytest.approx(2 / 3)  # 8 and 8.4 are too close
    assert summary.finished_share == pytest.approx(5 / 6)
    assert summarise([group(1, 3)]).standard_error is None


def test_summary_by_type_counts_a_group_under_each_of_its_types_once():
    by_type = summarise_by_type([group(0, 4, kinds=("a", "b")), group(2, 2, kinds=("b", "b"))])
    assert list(by_type) == ["b", "a"]
    assert (by_type["a"].groups, by_type["a"].mean_score) == (1, 2)
    assert (by_type["b"].groups, by_type["b"].usable_share) == (2, 0.5)


def test_summary_refuses_nothing_and_empty_groups():
    with pytest.raises(ValueError, match="no groups"):
        summarise([])
    with pytest.raises(ValueError, match="'x' has no responses"):
        summarise([group()])
