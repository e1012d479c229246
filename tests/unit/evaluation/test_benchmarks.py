"""Exports of the benchmarks, read by the benchmarks' own code where it can be installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation import alpaca_eval, arena_hard, mt_bench
from mpo_megatron.evaluation.questions import read_questions
from mpo_megatron.rollout.records import read_prompts, write_json, write_jsonl

ALPACA = [
    {"instruction": "Name a colour.", "dataset": "koala", "datasplit": "eval", "output": "old", "generator": "davinci"},
    {"instruction": "Name a dog.\nBe brief.", "dataset": "vicuna", "datasplit": "eval"},
    {"instruction": "Name a colour.", "dataset": "oasst"},
]  # fmt: skip
ARENA = [
    {"uid": "b7", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write a loop."},
    {"uid": "a1", "category": "creative_writing", "prompt": "Write a poem."},
]
MT = [
    {"question_id": 101, "category": "math", "turns": ["What is 1 + 1?", "And twice that?"]},
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorten it."], "reference": []},
    {"question_id": 90, "category": "other", "turns": ["Sing!", "Again!"]},
]

ANNOTATOR = """\
first:
  prompt_template: first/prompt.txt
  fn_completions: test_completions
  completions_kwargs: {value: Output (a)}
  completion_parser_kwargs: {outputs_to_match: {1: 'Output \\(a\\)'}}
  is_randomize_output_order: false
"""


def answered(prompts: list[dict], *texts: str) -> list[dict]:
    """As tools/generate.py writes them, each with a second sample that no export may take."""
    second = {"text": "another sample", "finish_reason": "length"}
    return [
        prompt | {"responses": [{"text": text, "finish_reason": "stop"}, second]}
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def read_back(path: Path, prompts: list[dict]) -> list[dict]:
    """The prompts through a file, as tools/generate.py takes them."""
    write_jsonl(path, prompts)
    return read_prompts(path)


def test_alpaca_eval(tmp_path):
    prompts = read_back(tmp_path / "prompts.jsonl", alpaca_eval.prompts(ALPACA))
    assert [prompt["prompt"] for prompt in prompts] == [question["instruction"] for question in ALPACA]
    outputs = alpaca_eval.outputs(ALPACA, answered(prompts, "Red.\n", " Rex", "Blue"), "mine")
    own = ["dataset", "datasplit", "instruction"]
    assert outputs == [
        {name: question[name] for name in own if name in question} | {"output": text, "generator": "mine"}
        for question, text in zip(ALPACA, ("Red.", "Rex", "Blue"), strict=True)
    ]
    assert outputs[0]["datasplit"] == "eval"
    assert "datasplit" not in outputs[2]


def test_alpaca_eval_reads_the_outputs(tmp_path, monkeypatch):
    """Through its command, with an annotator that prefers whatever it is shown first."""
    package = pytest.importorskip(
        "alpaca_eval", reason="alpaca_eval is not installed: pip install alpaca-eval"
    )
    monkeypatch.chdir(tmp_path)
    questions = [{"instruction": f"Say {number}.", "dataset": "koala"} for number in range(4)]
    paths = {}
    for model, texts in (
        ("base", ["one", "two", "three", "four"]),
        ("mine", ["1", "22", "three", "ä“\n\u2028x"]),
    ):
        paths[model] = tmp_path / f"{model}.json"
        groups = answered(alpaca_eval.prompts(questions), *texts)
        write_json(paths[model], alpaca_eval.outputs(questions, groups, model))
    frame = package.utils.load_or_convert_to_dataframe(paths["mine"])
    assert frame.to_dict("records") == json.loads(paths["mine"].read_text())
    assert package.utils.get_generator_name(None, frame) == "mine"

    annotator = tmp_path / "annotators" / "first"
    annotator.mkdir(parents=True)
    (annotator / "prompt.txt").write_text("{instruction} {output_1} {output_2}")
    (annotator / "configs.yaml").write_text(ANNOTATOR)
    table, annotations = package.evaluate(
        paths["mine"],
        reference_outputs=paths["base"],
        annotators_config=annotator,
        fn_metric="get_winrate",
        sort_by="win_rate",
        precomputed_leaderboard=None,
        output_path=None,
        is_return_instead_of_print=True,
        is_avoid_reannotations=False,
    )
    row = table.loc["mine"]
    assert row["n_total"] == 4
    assert row["avg_length"] == (1 + 2 + 5 + 5) // 4
    # Of four, one answer is the base's own and a draw; the base's, which come first, win the others.
    assert (row["n_draws"], row["n_wins_base"]) == (1, 3)
    assert {(one["generator_1"], one["generator_2"]) for one in annotations} == {("base", "mine")}


def test_arena_hard(tmp_path):
    prompts = read_back(tmp_path / "prompts.jsonl", arena_hard.prompts(ARENA))
    assert prompts == [{"id": "b7", "prompt": "Write a loop."}, {"id": "a1", "prompt": "Write a poem."}]
    groups = answered(prompts, "# Loop\n```\nfor\n```\n", "**Roses**")
    lines = arena_hard.answers(ARENA, groups, "mine", 12.5, lambda text: len(text.split()))
    # What gen_judgment.py and show_result.py read of a line, in the order that gen_answer.py leaves.
    assert [line["uid"] for line in lines] == ["a1", "b7"]
    assert [line["messages"][-1]["content"]["answer"] for line in lines] == [
        "**Roses**",
        "# Loop\n```\nfor\n```",
    ]
    assert lines[0]["messages"][0] == {"role": "user", "content": "Write a poem."}
    assert {line["model"] for line in lines} == {"mine"}
    assert lines[0]["tstamp"] == 12.5
    assert list(lines[0]["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
    assert lines[0]["metadata"]["token_len"] == 1
    assert lines[0]["metadata"]["bold_count"] == {"**": 1, "__": 0}
    assert lines[1]["metadata"]["header_count"]["h1"] == 1
    assert len({line["ans_id"] for line in lines}) == 2
    assert lines == arena_hard.answers(ARENA, groups, "mine", 12.5, lambda text: len(text.split()))
    assert all("metadata" not in line for line in arena_hard.answers(ARENA, groups, "mine", 0, None))


def test_markdown_is_counted_outside_of_code():
    text = (
        "# One\n## Two\n## Two again\n###### Six\n#No header\n\n"
        "1. first\n 2. second\n- a\n* b\n+ c\n-no item\n"
        "**bold** and **more bold** but **not\nover lines** __so__ _no_\n"
        "```python\n# comment\n- not an item\n**not bold**\n```\n"
    )
    assert arena_hard.markdown_counts(text) == {
        "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 1},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 2, "__": 1},
    }


def test_tokens_are_those_of_tiktoken(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed: pip install tiktoken")
    ranks = {bytes([number]): number for number in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding(
        "small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|end|>": 257}
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", {"gpt-4o": encoding}.__getitem__)
    count = arena_hard.token_counter()
    assert [count(text) for text in ("", "abc ab", "<|end|>")] == [0, 4, 7]  # special tokens are text, too


def test_a_vocabulary_that_cannot_be_had_is_one_sentence(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed: pip install tiktoken")

    def nowhere(model: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "encoding_for_model", nowhere)
    with pytest.raises(
        UserError,
        match=r"vocabulary of gpt-4o \(ConnectionError\); set TIKTOKEN_CACHE_DIR .* --without-style",
    ):
        arena_hard.token_counter()


def mt_answers(folder: Path) -> list[dict[str, Any]]:
    firsts = read_back(folder / "first.jsonl", mt_bench.first_turns(MT))
    assert [(prompt["id"], prompt["temperature"]) for prompt in firsts] == [
        ("101-1", 0.0),
        ("81-1", 0.7),
        ("90-1", 0.7),
    ]
    seconds = read_back(
        folder / "second.jsonl", mt_bench.second_turns(MT, answered(firsts, "Two.\n", "Roses.", ""))
    )
    assert seconds[0] == {
        "id": "101-2",
        "temperature": 0.0,
        "prompt": [
            {"role": "user", "content": "What is 1 + 1?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "And twice that?"},
        ],
    }
    return mt_bench.answers(MT, answered(seconds, "Four.", "Rose. ", "La"), "mine", 3.0)


def test_mt_bench(tmp_path):
    lines = mt_answers(tmp_path)
    assert [line["question_id"] for line in lines] == [81, 90, 101]
    assert lines[2] == {
        "question_id": 101,
        "answer_id": lines[2]["answer_id"],
        "model_id": "mine",
        "choices": [{"index": 0, "turns": ["Two.", "Four."]}],
        "tstamp": 3.0,
    }
    assert lines[1]["choices"][0]["turns"] == ["", "La"]


def test_fastchat_reads_the_answers(tmp_path):
    common = pytest.importorskip(
        "fastchat.llm_judge.common",
        reason="FastChat is not installed: pip install --no-deps fschat, and anthropic, openai",
        exc_type=ImportError,
    )
    folder = tmp_path / "model_answer"
    write_jsonl(folder / "mine.jsonl", mt_answers(tmp_path))
    write_jsonl(tmp_path / "question.jsonl", MT)
    questions = common.load_questions(str(tmp_path / "question.jsonl"), None, None)
    found = common.load_model_answers(str(folder))
    assert common.get_model_list(str(folder)) == ["mine"]
    judge = common.Judge("gpt-4", {}, multi_turn=True)
    common.check_data(questions[1:], found, {}, ["mine"], {"default": judge})
    for question, turns in zip(questions, (["Two.", "Four."], ["Roses.", "Rose."], ["", "La"]), strict=True):
        assert found["mine"][question["question_id"]]["choices"][0]["turns"] == turns
    theirs = {name: value for name, value in common.temperature_config.items() if name != "arena-hard-200"}
    assert theirs == mt_bench.TEMPERATURES


@pytest.mark.parametrize(
    ("benchmark", "text", "problem"),
    [
        (
            alpaca_eval,
            '[{"prompt": "x"}]',
            r"questions\.json\[0\]: instruction=None; a question .* has instruction",
        ),
        (arena_hard, '[{"uid": "a", "prompt": ""}]', r"\[0\]: prompt=''; a question .* has uid, prompt"),
        (mt_bench, '[{"question_id": "81", "category": "math", "turns": []}]', r"\[0\]: question_id='81'"),
        (alpaca_eval, "[7]", r"\[0\]: found int; a question must be a JSON object"),
        (alpaca_eval, "[]", r"questions\.json: holds no questions"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, benchmark, text, problem):
    path = tmp_path / "questions.json"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_questions(path, benchmark.FIELDS)


def test_answers_to_other_questions_are_refused():
    groups = answered(alpaca_eval.prompts(ALPACA), "a", "b", "c")
    with pytest.raises(UserError, match=r"'alpaca_eval-2' is not among the answers; sample the prompts that"):
        alpaca_eval.outputs(ALPACA, groups[:2], "mine")
    with pytest.raises(UserError, match=r"question 'alpaca_eval-0' was asked in other words"):
        alpaca_eval.outputs(ALPACA[::-1][1:], groups, "mine")
    firsts = answered(mt_bench.first_turns(MT), "a", "b", "c")
    with pytest.raises(UserError, match=r"question '101-2' is not among the answers"):
        mt_bench.answers(MT, firsts, "mine", 0)
    seconds = answered(mt_bench.second_turns(MT, firsts), "a", "b", "c")
    seconds[1]["prompt"] = [{"role": "user", "content": "Write a poem."}]
    with pytest.raises(UserError, match=r"question '81-2' was asked in other words"):
        mt_bench.answers(MT, seconds, "mine", 0)
    with pytest.raises(UserError, match=r"question 101 has turns=\['a'\]; it needs two texts"):
        mt_bench.first_turns([MT[0] | {"turns": ["a"]}])
