"""tools/evaluate.py by its command line, with a small model between the steps."""

import json
import re
import sys
from pathlib import Path

import pytest

from mpo_megatron.evaluation import arena_hard
from tests.helpers.models import make_llama
from tests.helpers.reward_models import make_pair_ranker
from tests.unit.tools.test_generate_score import read, write
from tools import evaluate, generate, score

QUESTIONS = [
    {"question_id": 82, "category": "coding", "turns": ["Name a colour.", "Another?"]},
    {"question_id": 81, "category": "stem", "turns": ["Red?", "Blue?"]},
]


def scored(path: Path, scores: dict[str, list[float]]) -> Path:
    """Groups with responses of these scores, each a character longer than the one before."""

    def response(number: int, score: float) -> dict:
        return {"text": "y" * (5 + number), "finish_reason": "stop", "score": score}

    return write(
        path,
        [
            {"id": name, "prompt": "x", "responses": [response(*item) for item in enumerate(own)]}
            for name, own in scores.items()
        ],
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


def sample(model: Path, prompts: Path, output: Path, samples: int = 1) -> list[dict]:
    generate.main(
        ["--model", str(model), "--prompts", str(prompts), "--output", str(output), "--samples", str(samples),
         "--max-new-tokens", "6", "--device", "cpu"]
    )  # fmt: skip
    return read(output)


def test_two_turns_of_mt_bench(model, tmp_path, capsys):
    questions = write(tmp_path / "question.jsonl", QUESTIONS)
    options = ["mt-bench", "--questions", str(questions)]
    prompts, firsts, seconds = (tmp_path / f"{name}.jsonl" for name in ("prompts", "first", "second"))
    evaluate.main(["prompts", *options, "--output", str(prompts)])
    first = sample(model, prompts, firsts)
    assert [group["temperature"] for group in first] == [0.0, 0.1]
    evaluate.main(["prompts", *options, "--first-answers", str(firsts), "--output", str(prompts)])
    second = sample(model, prompts, seconds)
    answers = tmp_path / "mine.jsonl"
    evaluate.main(
        ["answers", *options, "--answers", str(seconds), "--model-name", "mine", "--output", str(answers)]
    )
    turns = [
        [group["responses"][0]["text"].strip() for group in both] for both in zip(first, second, strict=True)
    ]
    found = read(answers)
    assert [line["question_id"] for line in found] == [81, 82]
    assert [line["choices"][0]["turns"] for line in found] == turns[::-1]
    assert found[0]["tstamp"] == seconds.stat().st_mtime
    assert f"{answers}: 2 answers of mine" in capsys.readouterr().out


def test_alpaca_eval_and_arena_hard(model, tmp_path, monkeypatch):
    prompts, groups = tmp_path / "prompts.jsonl", tmp_path / "groups.jsonl"
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"instruction": "Red?", "dataset": "koala"}, {"instruction": "Dog?"}]))
    evaluate.main(["prompts", "alpaca-eval", "--questions", str(questions), "--output", str(prompts)])
    texts = [group["responses"][0]["text"].strip() for group in sample(model, prompts, groups, 2)]
    options = ["--answers", str(groups), "--model-name", "mine", "--output", str(tmp_path / "out")]
    evaluate.main(["answers", "alpaca-eval", "--questions", str(questions), *options])
    assert json.loads((tmp_path / "out").read_text()) == [
        {"dataset": "koala", "instruction": "Red?", "output": texts[0], "generator": "mine"},
        {"instruction": "Dog?", "output": texts[1], "generator": "mine"},
    ]

    questions = write(
        tmp_path / "question.jsonl", [{"uid": "u", "prompt": "Red?", "category": "hard_prompt"}]
    )
    evaluate.main(["prompts", "arena-hard", "--questions", str(questions), "--output", str(prompts)])
    (group,) = sample(model, prompts, groups, 2)
    command = ["answers", "arena-hard", "--questions", str(questions), *options]
    evaluate.main([*command, "--without-style"])
    (line,) = read(tmp_path / "out")
    text = group["responses"][0]["text"].strip()
    assert line["messages"][-1]["content"] == {"answer": text}
    assert "metadata" not in line
    monkeypatch.setattr(arena_hard, "token_counter", lambda: len)
    evaluate.main(command)
    assert read(tmp_path / "out")[0]["metadata"]["token_len"] == len(text)


def test_a_report_of_two_files(tmp_path, capsys):
    base = scored(tmp_path / "base.jsonl", {"a": [1, 2], "b": [4], "c": [3], "d": [0, 1]})
    trained = scored(tmp_path / "trained.jsonl", {"b": [5, 3], "a": [2, 2], "c": [3], "d": [2]})
    evaluate.main(["report", "--base", str(base), "--trained", str(trained)])
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    assert figures["prompts"] == 4
    assert figures["reward"]["difference"]["value"] == pytest.approx((0.5 + 0 + 0 + 1.5) / 4)
    assert figures["win_rate"]["value"] == pytest.approx((0.75 + 0.5 + 0.5 + 1) / 4)
    low, high = (figures["win_rate"][end] for end in ("low", "high"))
    assert f"win rate of the trained model: 68.8% [{low:.1%}, {high:.1%}]" in printed
    rate = figures["length_controlled"]["rate"]["value"]
    assert re.search(rf"^at equal length: {rate:.1%} \[\d", printed, re.MULTILINE)
    assert re.search(r"reward +│ +2\.\d+ \[-?\d+\.\d+, \d+\.\d+\] │", printed)
    evaluate.main(["report", "--base", str(base), "--trained", str(base)])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["win_rate"]["value"] == 0.5


def test_a_pair_ranker_sees_both_models_answers(model, tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [{"id": name, "prompt": f"Name {name}."} for name in "abcd"])
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("base", "trained", "both", "scored")}
    sample(model, prompts, paths["base"], 2)
    other = make_llama(tmp_path / "other", seed=1)
    sample(other, prompts, paths["trained"], 3)
    evaluate.main(
        [
            "join",
            "--base",
            str(paths["base"]),
            "--trained",
            str(paths["trained"]),
            "--output",
            str(paths["both"]),
        ]
    )
    ranker = [
        "--scorer",
        "pair-ranker",
        "--model",
        str(make_pair_ranker(tmp_path / "ranker")),
        "--device",
        "cpu",
    ]
    score.main(["--input", str(paths["both"]), "--output", str(paths["scored"]), *ranker])
    capsys.readouterr()
    evaluate.main(["report", "--together", str(paths["scored"]), "--bradley-terry"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["prompts"] == 4
    # The scores of a group sum to 0 over two of the base model's and three of the trained one's.
    assert 2 * figures["reward"]["base"]["value"] == pytest.approx(-3 * figures["reward"]["trained"]["value"])
    assert (figures["win_rate"]["value"] > 0.5) == (figures["reward"]["difference"]["value"] > 0)
    # Scored one file at a time there is nothing to compare.
    for name in ("base", "trained"):
        score.main(["--input", str(paths[name]), "--output", str(tmp_path / f"{name}.scored.jsonl"), *ranker])
    with pytest.raises(SystemExit, match=r"evaluate\.py: the scores of every group sum to 0"):
        evaluate.main(
            ["report", "--base", str(tmp_path / "base.scored.jsonl"),
             "--trained", str(tmp_path / "trained.scored.jsonl")]
        )  # fmt: skip


def test_what_users_get_wrong_is_one_sentence(tmp_path, capsys, monkeypatch):
    questions = tmp_path / "questions.json"
    questions.write_text('[{"instruction": "Red?"}]')
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=r"evaluate\.py: --first-answers is for mt-bench; alpaca-eval has one turn"
    ):
        evaluate.main(
            ["prompts", "alpaca-eval", "--questions", str(questions), "--first-answers", "x", *output]
        )
    with pytest.raises(SystemExit, match=r"evaluate\.py: .*absent"):
        evaluate.main(["prompts", "alpaca-eval", "--questions", str(tmp_path / "absent.json"), *output])
    base = scored(tmp_path / "base.jsonl", {"a": [1]})
    for options in ([], ["--base", "x"], ["--base", "x", "--trained", "y", "--together", "z"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(["report", *options])
        assert "report needs --base and --trained, or --together alone" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    ours = ("mpo_megatron.evaluation.report", "mpo_megatron.evaluation.win_rate")
    for name in [name for name in sys.modules if name in ours or name.startswith("statsmodels.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"a report needs statsmodels.*: pip install 'mpo-megatron\[eval\]'"):
        evaluate.main(["report", "--base", str(base), "--trained", str(base)])
