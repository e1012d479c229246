"""The scorers of tools/score.py by its command line."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.data import read_groups as read_training_groups
from mpo_megatron.rollout import parts
from mpo_megatron.rollout.pair_ranker import PairRanker
from mpo_megatron.rollout.reward_models import RewardModel
from tests.helpers.judge_server import completion, failure, judge_server
from tests.helpers.reward_models import make_classifier, make_pair_ranker
from tests.unit.tools.test_generate_score import read, write
from tools import score

GROUPS: list[dict[str, Any]] = [
    {"id": f"g{number}", "prompt": f"Name {number} colours.", "responses": [
        {"text": "dog " * (number % 5) + str(number % 7), "finish_reason": "stop"},
        {"text": "No, " * (3 - number % 3) + str(number % 4), "finish_reason": "length"},
    ]}
    for number in range(9)
]  # fmt: skip


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    return write(tmp_path / "groups.jsonl", GROUPS)


def run(groups: Path, *options: str, output: str = "scored.jsonl") -> list[dict]:
    path = groups.with_name(output)
    score.main(["--input", str(groups), "--output", str(path), *options])
    return read(path)


def scores(records: list[dict]) -> list[list[float]]:
    return [[response["score"] for response in record["responses"]] for record in records]


@pytest.mark.parametrize("scorer", ["reward-model", "pair-ranker"])
def test_models(groups, tmp_path, scorer, capsys):
    folder = (make_classifier if scorer == "reward-model" else make_pair_ranker)(tmp_path / "model")
    options = ("--scorer", scorer, "--model", str(folder), "--device", "cpu", "--batch-tokens", "300")
    scored = run(groups, *options)
    kind = RewardModel if scorer == "reward-model" else PairRanker
    expected: Any = kind(str(folder), dtype="float32", device="cpu", batch_tokens=1)(GROUPS)[0]
    assert [record["id"] for record in scored] == [record["id"] for record in GROUPS]
    for found, alone in zip(scores(scored), expected, strict=True):
        assert found == pytest.approx(alone, abs=2e-5)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["groups"] == 9
    assert figures["mean_score"] == pytest.approx(sum(map(sum, expected)) / 18, abs=1e-4)
    training = list(read_training_groups(tmp_path / "scored.jsonl"))
    assert [[response.score for response in group.responses] for group in training] == scores(scored)


@pytest.mark.slow
def test_processes_share_the_groups(tmp_path):
    folder = make_classifier(tmp_path / "model")
    many = [group | {"id": f"{group['id']}-{copy}"} for copy in range(16) for group in GROUPS]
    groups = write(tmp_path / "groups.jsonl", many)
    options = ("--scorer", "reward-model", "--model", str(folder), "--device", "cpu")
    one = run(groups, *options)
    two = run(groups, *options, "--processes", "2", output="two.jsonl")
    for a, b in zip(scores(one), scores(two), strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def test_what_is_too_long_is_told_and_may_be_left_out(groups, tmp_path, capsys):
    folder = make_classifier(tmp_path / "model")
    records = [*GROUPS[:3], GROUPS[3] | {"prompt": "dog " * 300}, *GROUPS[4:]]
    write(groups, records)
    options = ("--scorer", "reward-model", "--model", str(folder), "--device", "cpu")
    with pytest.raises(
        SystemExit, match=r"1 of 9 groups have no score, first 'g3': prompt and response 1 have \d+"
    ):
        run(groups, *options)
    assert not (tmp_path / "scored.jsonl").exists()
    scored = run(groups, *options, "--leave-out-failed")
    assert [record["id"] for record in scored] == [f"g{number}" for number in (0, 1, 2, 4, 5, 6, 7, 8)]
    assert "left out: 1 of 9 groups" in capsys.readouterr().out


FUNCTION = """
def score(group):
    return [len(response["text"]) for response in group["responses"]]

def short(group):
    return [1.0]

def nothing(group):
    return [float("nan"), 1.0]

def text(group):
    return ["1", "2"]

def raises(group):
    raise KeyError("prompts")

constant = 3
"""


def test_a_function(groups, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    options = ("--scorer", "function", "--function")
    scored = run(groups, *options, "my_rewards.score")
    assert scores(scored) == [[float(len(r["text"])) for r in group["responses"]] for group in GROUPS]
    for name, message in {
        "short": r"group 'g\d': it returned 1 scores for 2 responses",
        "nothing": "the score of response 1 is nan",
        "text": "the score of response 1 is '1'",
        "raises": "it raised KeyError: 'prompts'",
        "constant": r"my_rewards\.py has no function 'constant'",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(groups, *options, f"my_rewards.{name}", output=f"{name}.jsonl")
    with pytest.raises(SystemExit, match="No module named 'no_rewards'; its module must be in"):
        run(groups, *options, "no_rewards.score")
    with pytest.raises(SystemExit, match="'score' must be a module and a function in it"):
        run(groups, *options, "score")


def judged(text: str, times: int):
    return completion(f"Score: {1 + int(text.split('</answer>')[0].strip()[-1])}")


def test_a_judge(groups, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with judge_server(judged) as server:
        options = ("--scorer", "judge", "--judge-url", server.url, "--judge-model", "m", "--judge-first-wait", "0.01",
                   "--judge-key-variable", "MY_KEY", "--judge-prices", "2", "10")  # fmt: skip
        scored = run(groups, *options)
        assert scores(scored) == [[1.0 + n % 7, 1.0 + n % 4] for n in range(9)]
        assert {headers["Authorization"] for _, headers, _, _ in server.requests} == {"Bearer secret"}
        printed = capsys.readouterr().out
        # 18 x (100 x 2 + 10 x 10) / 1e6
        assert "judge: 18 answers and 0 from the cache, 0 requests again, 1800 prompt and 180" in printed
        assert "answer tokens, 0.0054 USD" in printed
        assert run(groups, *options, output="again.jsonl") == scored
        assert len(server.requests) == 18
    assert not any("secret" in path.read_text(errors="replace") for path in tmp_path.iterdir())


def test_a_judge_that_fails_is_asked_again_by_the_next_start(groups, tmp_path, capsys):
    broken = [True]

    def answer(text: str, times: int):
        return failure(503) if broken[0] and "Name 4 colours" in text else judged(text, times)

    with judge_server(answer) as server:
        options = ("--scorer", "judge", "--judge-url", server.url, "--judge-model", "m", "--judge-first-wait", "0.01",
                   "--judge-attempts", "2")  # fmt: skip
        with pytest.raises(
            SystemExit, match=r"1 of 9 groups have no score, first 'g4': the judge was asked 2 times"
        ):
            run(groups, *options)
        assert "16 answers" in capsys.readouterr().out
        with pytest.raises(SystemExit, match=r"--judge-range was \[1\.0, 10\.0\] and not \[0\.0, 10\.0\]"):
            run(groups, *options, "--judge-range", "0", "10")
        broken[0] = False
        before = len(server.requests)
        assert scores(run(groups, *options)) == [[1.0 + n % 7, 1.0 + n % 4] for n in range(9)]
        assert len(server.requests) == before + 2


def test_a_wrong_key_ends_the_run_with_a_sentence(groups):
    with judge_server(lambda text, times: failure(401, "Incorrect API key")) as server:
        options = ("--scorer", "judge", "--judge-url", server.url, "--judge-model", "m")
        with pytest.raises(
            SystemExit, match=r"refused with status 401: .*Incorrect API key.*; check address"
        ):
            run(groups, *options)


def test_another_model_is_not_gone_on_with(groups, tmp_path, monkeypatch):
    folder = make_classifier(tmp_path / "model")
    options = ("--scorer", "reward-model", "--model", str(folder), "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "merge", lambda *arguments: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            run(groups, *options)
    with pytest.raises(SystemExit, match="--scorer was 'reward-model' and not 'function'"):
        run(groups, "--scorer", "function", "--function", "os.path.join")
    shutil.copytree(make_classifier(tmp_path / "other", num_hidden_layers=1), folder, dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="the model in --model was"):
        run(groups, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scorer", "reward-model"), "--scorer reward-model needs --model"),
        (("--scorer", "judge", "--judge-url", "http://x"), "--scorer judge needs --judge-model"),
        (("--scorer", "function"), "--scorer function needs --function"),
    ],
)
def test_what_a_scorer_needs(groups, options, message, capsys):
    with pytest.raises(SystemExit):
        run(groups, *options)
    assert message in capsys.readouterr().err


def test_options_that_make_no_sense(groups, tmp_path):
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        run(groups, "--scorer", "reward-model", "--model", str(tmp_path))
    folder = str(make_classifier(tmp_path / "model"))
    for option in ("--batch-tokens", "--processes", "--max-length"):
        with pytest.raises(SystemExit, match=f"{option} 0 must be at least 1"):
            run(groups, "--scorer", "reward-model", "--model", folder, option, "0")
    with pytest.raises(SystemExit, match="--objective-weights are for --scorer reward-model"):
        run(groups, "--scorer", "pair-ranker", "--model", folder, "--objective-weights", "1,2")
    judge = ("--scorer", "judge", "--judge-url", "http://x/v1", "--judge-model", "m")
    with pytest.raises(SystemExit, match=r"--judge-options \[1\] must be a JSON object"):
        run(groups, *judge, "--judge-options", "[1]")
    (tmp_path / "prompt.txt").write_text("Rate this.")
    with pytest.raises(SystemExit, match=r"must hold \{prompt\} and \{response\}"):
        run(groups, *judge, "--judge-prompt", str(tmp_path / "prompt.txt"))
