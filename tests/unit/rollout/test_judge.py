"""A judge over HTTP: what it is asked, what counts as an answer, and what is asked for again."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.judge import Judge, JudgeSettings
from mpo_megatron.rollout.work import Failure
from tests.helpers.judge_server import JudgeServer, completion, failure, judge_server

GROUPS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Name a colour.", "responses": [{"text": "Red 7"}, {"text": "Blue {prompt} 4"}]},
    {"id": "b", "prompt": "Jump {response}!", "responses": [{"text": "No 2"}]},
]
QUICK = {"first_wait": 0.01, "prompt": "Rate from {lowest} to {highest}. {prompt} | {response}"}


def judge(server: JudgeServer, folder: Path, **changes: Any) -> Judge:
    return Judge(JudgeSettings(url=server.url, model="m", **{**QUICK, **changes}), folder / "answers.sqlite")


def rated(text: str, times: int = 1):
    """The digit at the end of a response."""
    return completion(f"The score of 3 others does not matter. Score: {text[-1]}")


def test_what_is_asked_and_what_comes_back(tmp_path):
    with judge_server(rated) as server:
        asked = judge(server, tmp_path, key="secret", options={"temperature": 0.5, "seed": 3})
        values, tokens = asked(GROUPS)
    assert values == [[7.0, 4.0], [2.0]]
    assert tokens == 3 * 110
    # What stands in a prompt or response is not filled in.
    assert sorted(server.texts()) == [
        "Rate from 1 to 10. Jump {response}! | No 2",
        "Rate from 1 to 10. Name a colour. | Blue {prompt} 4",
        "Rate from 1 to 10. Name a colour. | Red 7",
    ]
    for path, headers, body, _ in server.requests:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret"
        assert {name: value for name, value in body.items() if name != "messages"} == {
            "model": "m", "temperature": 0.5, "seed": 3,
        }  # fmt: skip
        assert [message["role"] for message in body["messages"]] == ["user"]
    assert (asked.usage.answers, asked.usage.prompt_tokens, asked.usage.answer_tokens) == (3, 300, 30)
    assert asked.usage.cost((2.0, 10.0)) == pytest.approx((300 * 2 + 30 * 10) / 1e6)
    assert "secret" not in repr(asked.settings)
    assert b"secret" not in (tmp_path / "answers.sqlite").read_bytes()


def test_a_conversation_is_shown_with_its_speakers(tmp_path):
    turns = [("system", "Be brief."), ("user", "Name a colour."), ("assistant", "Red."), ("user", "Another?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    with judge_server(rated) as server:
        judge(server, tmp_path)([{"id": "a", "prompt": prompt, "responses": [{"text": "Green 5"}]}])
    said = "System: Be brief.\n\nUser: Name a colour.\n\nAssistant: Red.\n\nUser: Another?"
    assert server.texts() == [f"Rate from 1 to 10. {said} | Green 5"]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 7),
        ("**Score:** 6.5/10", 6.5),
        ('{"reason": "ok", "score": 3}', 3),
        ("I first thought score 9. SCORE = 2.", 2),
        ("Final score\n\n10", 10),
        ("Score (1-10): 8", 8),
        ("**Score (out of 10):** 8.5", 8.5),
        ("Score (7)", 7),
        ("A score of 9 out of 10.", 9),
        ("The score is **6**", 6),
        ("Score - 7", 7),
        ("On the score 1-10 scale, score: 3", 3),
        ("Half a fox \ud83e, score: 4", 4),
    ],
)
def test_forms_of_an_answer(tmp_path, answer, score):
    with judge_server(lambda text, times: completion(answer)) as server:
        assert judge(server, tmp_path)(GROUPS[1:])[0] == [[score]]


SILENT, SOON = 5.0, 2  # seconds without an answer, and after how many it is asked for again
FAILURES = [
    (failure(429), "ended with status 429"),
    (failure(500), "ended with status 500"),
    (failure(503, "overloaded"), "ended with status 503.*overloaded"),
    (failure(408), "status 408"),
    (SILENT, "gave no answer in 2 s|could not be reached"),
    (0.0, "could not be reached"),
    (completion("I cannot rate this."), 'answered without a "score".*I cannot'),
    (completion("Score (1-10)"), 'without a "score"'),
    (completion("A score from 1 to 10, score 1 to 10."), 'without a "score"'),
    (completion("Score: 11"), "scored 11, which is not from 1 to 10"),
    (completion("Score: -3"), "scored -3"),
    (completion(None), "answered without a text"),
    (completion(""), 'without a "score"'),
    ((200, {}, "<html>gateway</html>"), "answered what is no chat completion.*gateway"),
    ((200, {}, '{"choices": []}'), "no chat completion"),
    ((200, {}, "[1]"), "no chat completion"),
    ((200, {}, '{"choices": [{"message": {"content": "Score: 2"}}], "usage": {"prompt_tokens": "x"}}'), "no chat"),
    ((200, {}, '{"choices": [{"message": {"content": "Score: 2"}}], "usage": {"prompt_tokens": 1e999}}'), "no chat"),
    ((200, {}, "[" * 100_000), "no chat completion"),
]  # fmt: skip


def patience(reply) -> float:
    """A short one where the server says nothing alone: a busy machine may take long for any answer."""
    return SOON if reply == SILENT else 60


@pytest.mark.parametrize(("reply", "message"), FAILURES, ids=range(len(FAILURES)))
def test_what_fails_is_asked_for_again(tmp_path, reply, message):
    def answer(text: str, times: int):
        return reply if times < 3 else rated(text)

    with judge_server(answer) as server:
        asked = judge(server, tmp_path, timeout=patience(reply))
        assert asked(GROUPS[1:])[0] == [[2.0]]
        assert len(server.requests) == 3
        assert asked.usage.tried_again == 2
        assert asked.usage.answers == 1


@pytest.mark.parametrize(("reply", "message"), FAILURES, ids=range(len(FAILURES)))
def test_what_always_fails_has_no_score_and_the_others_do(tmp_path, reply, message):
    def answer(text: str, times: int):
        return reply if "Blue" in text else rated(text)

    with judge_server(answer) as server:
        asked = judge(server, tmp_path, timeout=patience(reply), attempts=2)
        values = asked(GROUPS)[0]
        assert isinstance(values[0], Failure)
        assert values[0].reason.startswith("the judge was asked 2 times, and at last ")
        assert re.search(message, values[0].reason), values[0].reason
        assert values[1] == [2.0]
        # What was answered is not asked for again, what was not is.
        before = len(server.requests)
        asked(GROUPS)
        assert len(server.requests) == before + 2
        assert asked.usage.from_cache == 2


def test_a_missing_server_is_told(tmp_path):
    with judge_server(rated) as server:
        pass
    values = judge(server, tmp_path, attempts=2)(GROUPS[1:])[0]
    assert isinstance(values[0], Failure)
    assert "could not be reached" in values[0].reason


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_asking_again_does_not_mend_ends_the_run(tmp_path, status):
    with judge_server(lambda text, times: failure(status, "Incorrect key")) as server:
        with pytest.raises(UserError, match=rf"refused with status {status}: .*Incorrect key.*check address"):
            judge(server, tmp_path, concurrency=1)([{**GROUPS[0], "responses": GROUPS[0]["responses"] * 20}])
        # One may be under way when the first comes back.
        assert len(server.requests) <= 2


def test_the_server_says_how_long_to_wait(tmp_path):
    def answer(text: str, times: int):
        return failure(429, retry_after="0.4") if times == 1 else rated(text)

    with judge_server(answer) as server:
        judge(server, tmp_path)(GROUPS[1:])
    first, second = (when for *_, when in server.requests)
    assert 0.4 <= second - first < 3


def test_waits_double(tmp_path):
    with judge_server(lambda text, times: failure(500)) as server:
        judge(server, tmp_path, attempts=4, first_wait=0.1)(GROUPS[1:])
    waits = [b - a for a, b in itertools.pairwise(when for *_, when in server.requests)]
    for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert least <= wait < least + 2


def test_answers_are_kept_and_not_paid_for_twice(tmp_path):
    with judge_server(rated) as server:
        first = judge(server, tmp_path)
        values = first(GROUPS)[0]
        first.close()
        again = judge(server, tmp_path)
        assert again(GROUPS) == (values, 0)
        assert len(server.requests) == 3
        assert (again.usage.from_cache, again.usage.answers, again.usage.prompt_tokens) == (3, 0, 0)
        # Another question is another answer.
        others: tuple[dict[str, Any], ...] = ({"options": {}}, {"prompt": "{prompt} {response}"})
        for changes in others:
            before = len(server.requests)
            judge(server, tmp_path, **changes)(GROUPS)
            assert len(server.requests) == before + 3


def test_an_answer_outside_of_a_new_range_is_asked_for_again(tmp_path):
    prompt = "{prompt} | {response}"
    with judge_server(rated) as server:
        judge(server, tmp_path, prompt=prompt)(GROUPS[:1])
        asked = judge(server, tmp_path, prompt=prompt, highest=5.0, attempts=1)
        assert isinstance(asked(GROUPS[:1])[0][0], Failure)
        assert len(server.requests) == 3
        assert asked.usage.from_cache == 1


def test_so_many_at_a_time(tmp_path):
    groups = [{"id": "a", "prompt": "p", "responses": [{"text": f"{n} 5"} for n in range(24)]}]
    with judge_server(rated) as server:
        judge(server, tmp_path, concurrency=3)(groups)
    assert server.most_at_once <= 3
    with judge_server(rated) as server:
        judge(server, tmp_path / "b", concurrency=12)(groups)
    assert server.most_at_once > 3


def test_so_many_in_a_minute(tmp_path):
    groups = [{"id": "a", "prompt": "p", "responses": [{"text": f"{n} 5"} for n in range(6)]}]
    with judge_server(rated) as server:
        judge(server, tmp_path, per_minute=600)(groups)
    times = sorted(when for *_, when in server.requests)
    assert times[-1] - times[0] >= 0.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"prompt": "Rate {response}"}, r"must hold \{prompt\} and \{response\}"),
        ({"lowest": 5.0, "highest": 5.0}, "give the lower number first"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"attempts": 0}, "attempts=0"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"per_minute": -1.0}, "rate -1.0"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        JudgeSettings(**{"url": "http://x/v1", "model": "m", **changes})


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"answers\.sqlite cannot hold the judge's answers .* --judge-cache"):
        Judge(JudgeSettings(url="http://x", model="m"), tmp_path / "answers.sqlite")
