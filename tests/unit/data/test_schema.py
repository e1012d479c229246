import json
import math
from typing import Any

import pytest

from mpo_megatron.data.schema import DataError, Message, ScoredResponse, group_from_record

WHERE = "train.jsonl:17"
USER = (Message("user", "Name a colour."),)


def grouped(*responses: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {"prompt": "Name a colour.", "responses": list(responses), **other}


GOOD, BAD = {"text": "Red.", "score": 7.5}, {"text": "Seven.", "score": -1}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def error_of(record: Any, prompt_key: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        group_from_record(record, WHERE, prompt_key)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message
    return message


# ---- shapes -------------------------------------------------------------------------------------------------


def test_responses_with_scores() -> None:
    group = group_from_record(grouped(GOOD, BAD, id=42), WHERE)
    assert group.id == "42"
    assert group.where == WHERE
    assert group.messages == USER
    assert group.responses == (ScoredResponse("Red.", 7.5), ScoredResponse("Seven.", -1.0))
    assert isinstance(group.responses[1].score, float)


def test_responses_with_labels_score_one_and_zero() -> None:
    record = grouped({"text": "Red.", "label": "preferred"}, {"text": "Seven.", "label": "dispreferred"})
    assert [response.score for response in group_from_record(record, WHERE).responses] == [1.0, 0.0]


def test_messages_keep_all_turns() -> None:
    turns = [turn("system", ""), turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "A colour?")]
    group = group_from_record({"messages": turns, "responses": [GOOD, BAD]}, WHERE)
    assert [message.role for message in group.messages] == ["system", "user", "assistant", "user"]
    assert group.messages[3].content == "A colour?"
    assert group_from_record({"prompt": turns, "responses": [GOOD, BAD]}, WHERE).messages == group.messages


@pytest.mark.parametrize("prompt_key", ["instruction", "prompt"])
def test_ultrafeedback(prompt_key: str) -> None:
    completions = [
        {"model": "a", "response": "Red.", "overall_score": 8.5, "fine-grained_score": 4.0},
        {"model": "b", "response": "Seven.", "overall_score": 2.0, "fine-grained_score": 1.0},
    ]
    group = group_from_record(
        {prompt_key: "Name a colour.", "completions": completions, "source": "x"}, WHERE
    )
    assert group.messages == USER
    assert [(response.text, response.score) for response in group.responses] == [
        ("Red.", 8.5),
        ("Seven.", 2.0),
    ]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({}, [1.0, 0.0]),
        ({"score_chosen": None, "score_rejected": None}, [1.0, 0.0]),
        ({"score_chosen": 4.5, "score_rejected": 4.0}, [4.5, 4.0]),
        ({"chosen_score": 0.1, "rejected_score": 0.3}, [0.1, 0.3]),
    ],
)
def test_pair_of_texts(scores: dict[str, Any], expected: list[float]) -> None:
    record = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven.", **scores}
    group = group_from_record(record, WHERE)
    assert group.messages == USER
    assert [response.text for response in group.responses] == ["Red.", "Seven."]
    assert [response.score for response in group.responses] == expected


def test_pair_of_conversations_has_its_prompt_inside() -> None:
    """As in binarised UltraFeedback, whose `messages` are the chosen conversation, answer included."""
    chosen = [turn("user", "Name a colour."), turn("assistant", "Red.")]
    rejected = [turn("user", "Name a colour."), turn("assistant", "Seven.")]
    record = {
        "prompt": "other",
        "prompt_id": "ab12",
        "messages": chosen,
        "chosen": chosen,
        "rejected": rejected,
    }
    group = group_from_record(record, WHERE)
    assert group.id == "ab12"
    assert group.messages == USER
    assert [response.text for response in group.responses] == ["Red.", "Seven."]


def test_pair_of_single_answers_takes_the_prompt_from_the_record() -> None:
    record = {
        "prompt": [turn("user", "Name a colour.")],
        "chosen": [turn("assistant", "Red.")],
        "rejected": [turn("assistant", "Seven.")],
    }
    assert group_from_record(record, WHERE).messages == USER


def test_lists_of_responses_and_scores() -> None:
    record = {
        "prompt": "Name a colour.",
        "all_generated_responses": ["Red.", "Seven.", "Blue."],
        "all_rm_scores": [0.2, 0.1, 0.3],
        "chosen": [turn("user", "Name a colour."), turn("assistant", "Blue.")],
        "rejected": [turn("user", "Name a colour."), turn("assistant", "Seven.")],
    }
    assert [response.score for response in group_from_record(record, WHERE).responses] == [0.2, 0.1, 0.3]


def test_columns_of_none_count_as_absent() -> None:
    """Rows of a Parquet file have all columns."""
    responses = [
        {**GOOD, "label": None, "finish_reason": None},
        {**BAD, "label": None, "finish_reason": "length"},
    ]
    record = {
        "id": None,
        "messages": None,
        "prompt": "Name a colour.",
        "responses": responses,
        "completions": None,
    }
    group = group_from_record(record, WHERE)
    assert group.messages == USER
    assert [response.finish_reason for response in group.responses] == ["stop", "length"]


def test_id_defaults_to_the_place_without_its_folder() -> None:
    assert group_from_record(grouped(GOOD, BAD), "/somewhere/else/train.jsonl:17").id == "train.jsonl:17"
    assert group_from_record(grouped(GOOD, BAD, id=0), WHERE).id == "0"


def test_prompt_key_names_the_prompt() -> None:
    record = grouped(GOOD, BAD, question="Name a colour?")
    assert group_from_record(record, WHERE, "question").messages == (Message("user", "Name a colour?"),)
    message = error_of(record, "quesiton")
    assert "prompt_key='quesiton'" in message
    assert "(prompt, responses, question)" in message


# ---- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_score_not_finite(score: float) -> None:
    message = error_of(grouped(GOOD, {"text": "Seven.", "score": score}))
    assert f"response 2 of 2 has score {score}; scores must be finite numbers" in message


def test_score_not_finite_in_json() -> None:
    record = json.loads(
        '{"prompt": "p", "responses": [{"text": "a", "score": NaN}, {"text": "b", "score": 1}]}'
    )
    assert "response 1 of 2 has score nan" in error_of(record)


@pytest.mark.parametrize(
    ("score", "kind"), [("7.5", "a text"), (True, "a truth value"), ([1.0], "a list of a number")]
)
def test_score_not_a_number(score: Any, kind: str) -> None:
    message = error_of(grouped({"text": "Red.", "score": score}, BAD))
    assert f"response 1 of 2 has score {score!r}, {kind}; scores must be numbers" in message


def test_score_missing() -> None:
    assert 'response 2 of 2 has no score; add a "score"' in error_of(grouped(GOOD, {"text": "Seven."}))
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0}
    assert "response 2 of 2 has no score" in error_of(pair)


def test_unknown_label() -> None:
    record = grouped({"text": "Red.", "label": "good"}, {"text": "Seven.", "label": "dispreferred"})
    assert 'response 1 of 2 has label \'good\'; write "preferred" or "dispreferred"' in error_of(record)


def test_labels_and_scores_do_not_mix() -> None:
    assert "some responses have a score" in error_of(
        grouped(GOOD, {"text": "Seven.", "label": "dispreferred"})
    )


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_response(text: str) -> None:
    assert "response 2 of 2 is empty; remove" in error_of(grouped(GOOD, {"text": text, "score": 0.0}))


def test_response_without_text() -> None:
    assert "response 1 of 2 has nothing for its text" in error_of(grouped({"score": 1.0}, BAD))
    assert "response 1 of 2 has a number for its text" in error_of(grouped({"text": 3, "score": 1.0}, BAD))


@pytest.mark.parametrize(("responses", "found"), [([GOOD], "1 response"), ([], "no responses")])
def test_fewer_than_two_responses(responses: list[dict[str, Any]], found: str) -> None:
    assert f"the group has {found} and needs at least 2" in error_of(grouped(*responses))


@pytest.mark.parametrize("responses", ["Red.", {"text": "Red."}, ["Red.", "Seven."]])
def test_responses_of_the_wrong_kind(responses: Any) -> None:
    assert "it must be a list of objects" in error_of({"prompt": "p", "responses": responses})


def test_score_lists_that_do_not_match() -> None:
    record = {"prompt": "p", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [1.0, 2.0]}
    assert "all_generated_responses has 3 entries and all_rm_scores has 2" in error_of(record)
    record = {"prompt": "p", "all_generated_responses": "abc", "all_rm_scores": [1.0, 2.0]}
    assert "all_generated_responses is a text; it must be a list" in error_of(record)


def test_pair_with_two_prompts() -> None:
    record = {
        "chosen": [turn("user", "Name a colour."), turn("assistant", "Red.")],
        "rejected": [turn("user", "Name a number."), turn("assistant", "Seven.")],
    }
    assert "chosen and rejected differ before their last turn" in error_of(record)


def test_pair_that_does_not_end_with_an_answer() -> None:
    record = {"chosen": [turn("user", "Name a colour.")], "rejected": [turn("user", "Name a colour.")]}
    assert "the last message of chosen has role 'user'" in error_of(record)


def test_no_prompt() -> None:
    assert "there is no prompt among the keys (responses, topic)" in error_of(
        {"responses": [GOOD, BAD], "topic": "x"}
    )


@pytest.mark.parametrize("prompt", ["", "  \n", [turn("system", "Be brief."), turn("user", " ")]])
def test_empty_prompt(prompt: Any) -> None:
    assert "the prompt is empty" in error_of({"prompt": prompt, "responses": [GOOD, BAD]})


def test_prompt_without_messages() -> None:
    assert "the prompt has no messages" in error_of({"messages": [], "responses": [GOOD, BAD]})


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (
            [turn("human", "Hi.")],
            "message 1 of the prompt has role 'human'; roles are system, user, assistant",
        ),
        ([{"content": "Hi."}], "message 1 of the prompt has role None"),
        (
            [turn("user", "Hi."), turn("assistant", "Hello.")],
            "the last message of the prompt has role 'assistant'",
        ),
        ([turn("system", "Be brief.")], "the last message of the prompt has role 'system'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a list of an object for content"),
        (["Hi."], "the prompt is a list of a text; it must be a list of objects"),
    ],
)
def test_wrong_messages(messages: list[Any], problem: str) -> None:
    assert problem in error_of({"messages": messages, "responses": [GOOD, BAD]})


def test_unknown_shape_lists_keys_and_shapes() -> None:
    message = error_of({"text": "x", "score": 1.0, "label": None})
    assert "no known shape has the keys found (text, score)" in message
    for key in ("responses", "completions", "all_rm_scores", "chosen", "rejected"):
        assert f'"{key}"' in message


@pytest.mark.parametrize(
    ("record", "kind"), [([1, 2], "a list of a number"), ("x", "a text"), (3, "a number")]
)
def test_record_that_is_no_object(record: Any, kind: str) -> None:
    assert f"found {kind}; a record must be an object" in error_of(record)
