import itertools
from typing import Any

import pytest

from mpo_megatron.rollout.constraints import check_constraint, constraint_types, satisfaction
from mpo_megatron.rollout.text import paragraphs, sentences, words

# (constraint, text, satisfaction worked out by hand)
CASES: list[tuple[dict[str, Any], str, float]] = [
    ({"type": "max_words", "limit": 4}, "One two three four.", 1),
    ({"type": "max_words", "limit": 4}, "one two three four five six seven eight nine", 0.25),  # (5 / 10)^2
    ({"type": "min_words", "minimum": 4}, "one two three", 0.75),
    ({"type": "word_range", "minimum": 2, "maximum": 4}, "one", 0.5),
    ({"type": "word_range", "minimum": 2, "maximum": 4}, "one two three", 1),
    ({"type": "word_range", "minimum": 2, "maximum": 4}, "1 2 3 4 5 6 7 8 9", 0.25),
    ({"type": "max_sentences", "limit": 2}, "It is 3.5 km. We walk!", 1),
    ({"type": "max_sentences", "limit": 1}, "One. Two. Three.", 0.25),
    ({"type": "sentence_count", "count": 2}, "Only one.", 0.25),
    ({"type": "sentence_count", "count": 2}, 'He said "no." Then he left.', 1),
    (
        {"type": "short_sentences", "limit": 3},
        "I am here. I am here for one week now.",
        (1 + (4 / 8) ** 2) / 2,
    ),
    ({"type": "paragraph_count", "count": 2}, "First.\n\nSecond.\n", 1),
    ({"type": "include_word", "word": "sun"}, "The Sun!", 1),
    ({"type": "include_word", "word": "sun"}, "Sunny days", 0.5),
    ({"type": "include_word", "word": "sun"}, "Rain", 0),
    ({"type": "include_words", "words": ["salt", "wind"]}, "Salt in the air", 0.5),
    ({"type": "avoid_word", "word": "flour"}, "Flour and more flour, and flours", 1 / 3),
    ({"type": "avoid_words", "words": ["a", "b"]}, "a or b or b", 1 / 4),
    ({"type": "no_commas"}, "No comma here", 1),
    ({"type": "no_commas"}, "one, two, three", 1 / 3),
    ({"type": "no_digits"}, "in 1969 and 2024", 1 / 3),
    ({"type": "has_number"}, "It is 5 m", 1),
    ({"type": "has_number"}, "five metres", 0.5),
    ({"type": "has_number"}, "tall", 0),
    ({"type": "exclamation_count", "count": 2}, "Go!", 0.25),
    ({"type": "all_lowercase"}, "quiet and small.", 1),
    ({"type": "all_lowercase"}, "The cat met Tom", 1 / 3),
    ({"type": "all_uppercase"}, "STOP THE CAR now", 0.75),
    ({"type": "start_with_phrase", "phrase": "Dear friend"}, '"dear friend, hello"', 1),
    ({"type": "start_with_phrase", "phrase": "b"}, "aaab", 0.6 * 0.25),
    ({"type": "start_with_phrase", "phrase": "zz"}, "aaab", 0),
    ({"type": "end_with_phrase", "phrase": "Good luck"}, "Prepare well. Good luck!", 1),
    ({"type": "end_with_phrase", "phrase": "b"}, "abcd", 0.6 * 0.5),
    ({"type": "end_with_phrase", "phrase": "zz"}, "abcd", 0),
    ({"type": "end_with_question"}, 'I like it. "Do you?"', 1),
    ({"type": "end_with_question"}, "Do? I do", 0.5 * 3 / 8),
    ({"type": "quoted"}, '"All of it"', 1),
    ({"type": "quoted"}, '"', 0.4),
    ({"type": "quoted"}, 'He said "no" twice', 0.2),
    ({"type": "postscript"}, "See you.\n\nP.S. Bring bread.", 1),
    ({"type": "postscript"}, "P.S. Bring bread.\nSee you.", 0.5),
    ({"type": "postscript"}, "See you.", 0),
    ({"type": "bullet_count", "count": 2}, "Here:\n- one\n* two", 1),
    ({"type": "bullet_count", "count": 2}, "1. one\n2. two", 0.5),
    ({"type": "bullet_count", "count": 2}, "**bold** text", 0),
    ({"type": "numbered_list_count", "count": 2}, "1. one\n2) two\n3. three\n4. four", 0.25),
    ({"type": "comma_list_count", "count": 3}, "apples, pears, plums", 1),
    ({"type": "comma_list_count", "count": 2}, "apples,\npears", 0.5),  # two lines
    ({"type": "title_line"}, "# Snow\nIt falls.", 1),
    ({"type": "title_line"}, "Snow falls.\nIt falls.", 0),
    ({"type": "title_line"}, "Snow", 0.5),
    ({"type": "json_only", "keys": ["name", "reason"]}, '{"name": "Tom", "reason": "soft"}', 1),
    ({"type": "json_only", "keys": ["name", "reason"]}, '{"name": "Tom"}', 0.75),
    ({"type": "json_only", "keys": ["name", "reason"]}, 'Here: {"name": 1, "reason": 2}', 0.75),
    ({"type": "json_only", "keys": ["name", "reason"]}, '{"name": Tom}', 0.15),
    ({"type": "json_only"}, '{"a": 1}', 1),
    ({"type": "json_only"}, "[1, 2]", 0),
]


@pytest.mark.parametrize(("constraint", "text", "expected"), CASES)
def test_satisfaction_by_hand(constraint, text, expected):
    assert satisfaction(text, constraint) == pytest.approx(expected)


def test_every_type_has_a_case():
    assert {constraint["type"] for constraint, _, _ in CASES} == set(constraint_types())


@pytest.mark.parametrize("constraint", [constraint for constraint, _, _ in CASES])
@pytest.mark.parametrize(
    "text", ["", " \n", "?", '"', "{", "{}", "{[}", "é 日本語 🙂", "a" * 5000, "- \n" * 50, "\x00"]
)
def test_any_text_is_graded_between_0_and_1(constraint, text):
    assert 0 <= satisfaction(text, constraint) <= 1


def test_further_off_is_graded_lower():
    grades = [satisfaction("word " * n, {"type": "max_words", "limit": 10}) for n in (10, 12, 15, 30, 60)]
    assert grades[0] == 1
    assert all(near > far > 0 for near, far in itertools.pairwise(grades))


@pytest.mark.parametrize(
    ("constraint", "parts"),
    [
        ({"type": "max_word", "limit": 3}, ["'max_word'", "unknown", "max_words"]),
        ({"limit": 3}, ["type", "record"]),
        ("no_commas", ["no_commas", "record"]),
        ({"type": "max_words"}, ["'limit'", "whole number"]),
        ({"type": "max_words", "limit": 0}, ["limit=0", "at least 1"]),
        ({"type": "max_words", "limit": "20"}, ["limit='20'", "whole number"]),
        ({"type": "max_words", "limit": True}, ["limit=True", "whole number"]),
        ({"type": "max_words", "limit": 3, "max": 4}, ["'max'", "limit"]),
        ({"type": "include_word", "word": " "}, ["word=' '", "not empty"]),
        ({"type": "include_words", "words": []}, ["words=[]", "list of texts"]),
        ({"type": "json_only", "keys": "name"}, ["keys='name'", "list of texts", "optional"]),
        ({"type": "word_range", "minimum": 9, "maximum": 3}, ["minimum=9", "maximum=3", "swap"]),
    ],
)
def test_wrong_constraints_are_refused_with_value_rule_and_fix(constraint, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        check_constraint(constraint)
    assert all(part in str(error.value) for part in parts)


def test_words_sentences_paragraphs():
    assert words("Don't stop—it's 3 o'clock, well-known!") == [
        "don't",
        "stop",
        "it's",
        "3",
        "o'clock",
        "well-known",
    ]
    assert sentences("1. Take 2.5 g. Stir.\n- Done\n---\nWhy?") == ["Take 2.5 g.", "Stir.", "Done", "Why?"]
    assert paragraphs("a\nb\n \n\nc\n") == ["a\nb", "c"]
