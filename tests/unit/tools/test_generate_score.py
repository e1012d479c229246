import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mpo_megatron.rollout import parts
from mpo_megatron.rollout.rewards import verified_score
from tests.helpers.models import make_llama
from tools import generate, score

PROMPT_RECORDS = [
    {
        "id": "a",
        "split": "train",
        "prompt": "Name a colour.",
        "constraints": [{"type": "max_words", "limit": 9}],
    },
    {
        "id": "b",
        "split": "validation",
        "prompt": "A dog?",
        "constraints": [{"type": "no_commas"}],
        "topic_words": ["dog"],
    },
    {
        "id": "c",
        "split": "train",
        "prompt": "Say three.",
        "constraints": [{"type": "no_commas"}],
        "note": "dropped",
    },
]


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", PROMPT_RECORDS)


def run_generate(model: Path, prompts: Path, output: Path, *options: str) -> list[dict]:
    settings = ["--samples", "2", "--max-new-tokens", "8", "--batch-size", "4", "--device", "cpu"]
    generate.main(
        ["--model", str(model), "--prompts", str(prompts), "--output", str(output), *settings, *options]
    )
    return read(output)


def test_generate_then_score(model, prompts, tmp_path, capsys):
    groups = run_generate(model, prompts, tmp_path / "out" / "groups.jsonl")
    assert [group["id"] for group in groups] == ["a", "b", "c"]
    assert groups[1] == PROMPT_RECORDS[1] | {"responses": groups[1]["responses"]}
    assert "note" not in groups[2]
    assert all(len(group["responses"]) == 2 for group in groups)
    # No temporary file is left.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["groups.jsonl"]
    assert "3 groups of 2 responses" in capsys.readouterr().out

    scored_path = tmp_path / "scored.jsonl"
    score.main(["--input", str(tmp_path / "out" / "groups.jsonl"), "--output", str(scored_path)])
    scored = read(scored_path)
    for group, source in zip(scored, groups, strict=True):
        for response, original in zip(group["responses"], source["responses"], strict=True):
            expected = verified_score(
                original["text"],
                source["constraints"],
                prompt=source["prompt"],
                finished=original["finish_reason"] == "stop",
                topic_words=source.get("topic_words", []),
            )
            assert response == original | {"score": round(expected, 3)}

    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    means = [sum(r["score"] for r in group["responses"]) / 2 for group in scored]
    assert figures["groups"] == 3
    assert figures["mean_score"] == pytest.approx(sum(means) / 3, abs=1e-4)
    assert figures["standard_error"] >= 0
    assert [line.split()[:2] for line in printed[1:4]] == [
        ["all", "3"],
        ["no_commas", "2"],
        ["max_words", "1"],
    ]

    # A scored file can be sampled and scored anew.
    assert len(run_generate(model, scored_path, tmp_path / "again.jsonl", "--seed", "1")) == 3
    score.main(["--input", str(scored_path), "--summary-only"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures


def test_generate_gives_the_same_at_any_batch_size_and_number_of_processes(model, prompts, tmp_path):
    first = run_generate(model, prompts, tmp_path / "first.jsonl")
    assert run_generate(model, prompts, tmp_path / "small.jsonl", "--batch-size", "2") == first
    assert (
        run_generate(model, prompts, tmp_path / "two.jsonl", "--processes", "2", "--batch-size", "2") == first
    )
    assert run_generate(model, prompts, tmp_path / "other.jsonl", "--seed", "1") != first


def test_generate_goes_on_where_it_stopped_and_only_with_the_same_settings(
    model, prompts, tmp_path, capsys, monkeypatch
):
    first = run_generate(model, prompts, tmp_path / "first.jsonl")
    output = tmp_path / "groups.jsonl"

    def fails(*arguments, **named):
        sampler = start(*arguments, **named)
        batches = iter([sampler])

        def worker(batch):
            if (work := next(batches, None)) is None:
                raise OSError("No space left on device")
            return work(batch)

        return worker

    start = generate.start_sampler
    monkeypatch.setattr(generate, "start_sampler", fails)
    with pytest.raises(SystemExit, match="No space left"):
        run_generate(model, prompts, output, "--batch-size", "2")
    monkeypatch.setattr(generate, "start_sampler", start)
    assert not output.exists()
    with pytest.raises(
        SystemExit, match=r"groups\.jsonl\.parts holds .* --temperature was 1\.0 and not 0\.5"
    ):
        run_generate(model, prompts, output, "--temperature", "0.5")
    records = read(prompts)
    write(prompts, [*records[:2], records[2] | {"prompt": "Say four."}])
    with pytest.raises(SystemExit, match="the record 'c' was another"):
        run_generate(model, prompts, output)
    write(prompts, [*records[:2], records[2] | {"note": "goes nowhere"}])
    capsys.readouterr()
    assert run_generate(model, prompts, output) == first
    assert "1 of 3 groups are there already" in capsys.readouterr().out


def test_a_model_that_was_trained_on_is_another(model, prompts, tmp_path, monkeypatch):
    copy = shutil.copytree(model, tmp_path / "model")
    output = tmp_path / "groups.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "merge", lambda *arguments: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            run_generate(copy, prompts, output)
    shutil.copytree(make_llama(tmp_path / "trained", seed=1), copy, dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="the model in --model was"):
        run_generate(copy, prompts, output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_vllm_without_a_gpu_is_one_sentence(model, prompts, tmp_path, processes):
    with pytest.raises(
        SystemExit, match=r"--backend vllm needs a GPU, and torch finds none here; .*--backend hf"
    ):
        run_generate(model, prompts, tmp_path / "out.jsonl", "--backend", "vllm", "--processes", processes)
    # Nothing is left that would stand in the way of another backend.
    assert len(run_generate(model, prompts, tmp_path / "out.jsonl")) == 3


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_one_sentence(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        SystemExit, match=r"vLLM does not load .*pip install 'mpo-megatron\[vllm\]'.*--backend hf"
    ):
        run_generate(model, prompts, tmp_path / "out.jsonl", "--backend", "vllm")
    with pytest.raises(SystemExit, match="process 1 needs 2 GPUs and 1 of 1 are left for it"):
        run_generate(model, prompts, tmp_path / "out.jsonl", "--backend", "vllm", "--gpus-per-process", "2")


def test_generate_takes_a_split_and_a_limit(model, prompts, tmp_path):
    output = tmp_path / "groups.jsonl"
    assert [g["id"] for g in run_generate(model, prompts, output, "--split", "train")] == ["a", "c"]
    assert [g["id"] for g in run_generate(model, prompts, output, "--split", "validation")] == ["b"]
    assert [g["id"] for g in run_generate(model, prompts, output, "--limit", "1", "--samples", "3")] == ["a"]
    assert len(read(output)[0]["responses"]) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "prompt"', r"prompts.jsonl:2: not valid JSON"),
        ("[]", r"prompts.jsonl:2: found list"),
        ('{"id": "b", "prompt": "x", "constraints": []}', r"prompts.jsonl:2: constraints=\[\] must be a list"),
        ('{"id": "b", "prompt": "x", "constraints": [{"type": "rhymes"}]}', r":2: constraint type 'rhymes' is unknown"),
        ('{"id": 7, "prompt": "x", "constraints": [{"type": "no_commas"}]}', r":2: id=7 must be a text"),
        ('{"id": "a", "prompt": "x", "constraints": [{"type": "no_commas"}]}', r":2: the id 'a' occurs twice"),
        ('{"id": "b", "prompt": "x", "constraints": [{"type": "no_commas"}], "topic_words": "s"}', r":2: topic_words="),
        ('{"id": "b", "prompt": "x", "temperature": -1}', r":2: temperature=-1 must be a number from 0"),
        ('{"id": "b", "prompt": [{"role": "user"}]}', r":2: message 1 of the prompt has nothing for content"),
        ('{"id": "b", "prompt": []}', r":2: the prompt has no messages"),
    ],
)  # fmt: skip
def test_generate_names_file_and_line_of_what_is_wrong(tmp_path, line, message):
    path = write(tmp_path / "prompts.jsonl", PROMPT_RECORDS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(SystemExit, match=message):
        run_generate(tmp_path, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (None, r":1: there are no responses"),
        ([], r":1: there are no responses"),
        ([{"finish_reason": "stop"}], r":1: response 1 has no text"),
        ([{"text": "x", "finish_reason": "eos"}], r":1: response 1 has finish_reason='eos'"),
    ],
)
def test_score_names_what_is_wrong_with_a_group(tmp_path, responses, message):
    path = write(tmp_path / "groups.jsonl", [PROMPT_RECORDS[0] | {"responses": responses}])
    with pytest.raises(SystemExit, match=message):
        score.main(["--input", str(path), "--summary-only"])


def test_constraints_are_needed_to_score_by_them(model, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Name a colour."}])
    run_generate(model, prompts, tmp_path / "groups.jsonl")
    with pytest.raises(SystemExit, match=r"groups\.jsonl:1: constraints=None must be a list"):
        score.main(["--input", str(tmp_path / "groups.jsonl"), "--summary-only"])


def test_paths_and_options_that_lead_nowhere(model, prompts, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"absent\.jsonl: no such file"):
        score.main(["--input", str(tmp_path / "absent.jsonl"), "--summary-only"])
    with pytest.raises(SystemExit, match="not a folder"):
        run_generate(tmp_path / "absent", prompts, tmp_path / "out.jsonl")
    with pytest.raises(SystemExit, match="--limit 0"):
        run_generate(model, prompts, tmp_path / "out.jsonl", "--limit", "0")
    with pytest.raises(SystemExit, match=r"record 'a' has temperature 0, at which its 2 samples"):
        run_generate(model, prompts, tmp_path / "out.jsonl", "--temperature", "0")
    for option in ("--processes", "--gpus-per-process"):
        with pytest.raises(SystemExit, match=f"{option} 0.* must be at least 1"):
            run_generate(model, prompts, tmp_path / "out.jsonl", option, "0")
    with pytest.raises(SystemExit, match=r"batch_size=1 .* 2 samples"):
        run_generate(model, prompts, tmp_path / "out.jsonl", "--batch-size", "1")
    with pytest.raises(SystemExit, match="2"):
        score.main(["--input", str(prompts)])
    assert "--output is missing" in capsys.readouterr().err
    write(prompts, PROMPT_RECORDS[:1])
    with pytest.raises(SystemExit, match='no prompt with "split": "validation"'):
        run_generate(model, prompts, tmp_path / "out.jsonl", "--split", "validation")
