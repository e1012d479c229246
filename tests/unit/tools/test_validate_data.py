"""What the tool says of data is what a run makes of them."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from mpo_megatron.config import FaultConfig
from mpo_megatron.data import Selection, TokenizeOptions, build_dataset
from tests.helpers.models import make_llama
from tests.helpers.tokenizers import LLAMA2, make_tokenizer
from tests.unit.data.test_faults import LINES, line
from tools.validate_data import main

OPTIONS = TokenizeOptions(max_prompt_length=40, max_length=60)
LIMITS = ["model.data.max_prompt_length=40", "model.data.max_length=60"]


def good(folder: Path) -> Path:
    path = folder / "good.jsonl"
    groups = [
        {
            "id": f"g{n}",
            "prompt": f"Name {n} colours.",
            "responses": [{"text": "Red " * (k + 1), "score": float((n * k) % 5)} for k in range(2 + n % 4)],
        }
        for n in range(1, 40)
    ]
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, dict[str, Any]]:
    status = main(args)
    output = capsys.readouterr().out
    return status, output, json.loads(output.splitlines()[-1])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_llama(tmp_path / "model", max_position_embeddings=512)
    make_tokenizer(LLAMA2).save_pretrained(folder)
    return folder


def test_figures_are_those_of_the_runs_own_groups(tmp_path: Path, model: Path, capsys: Any) -> None:
    data = good(tmp_path)
    keys = [*LIMITS, f"model.data.train={data}", f"model.restore_from_path={model}"]
    keys += ["model.data.keep_best=1", "model.data.keep_worst=2", "model.mpo.partition=selected"]
    status, _, figures = run(capsys, *keys)
    train = figures["train"]
    assert (status, train["unit"], train["groups"], train["stops"]) == (0, "tokens", 39, False)
    built = build_dataset(
        data, make_tokenizer(LLAMA2), OPTIONS, cache_dir=tmp_path / "cache",
        selection=Selection(partition="selected", keep_best=1, keep_worst=2, needs_preferred=False),
    )  # fmt: skip
    groups = [built.group(i) for i in range(len(built))]
    found = train["distributions"]
    preferred = [int(group.preferred.sum()) for group in groups]
    assert train["without_preferred"] == preferred.count(0) > 0
    assert found["preferred of a group"]["mean"] == np.mean(preferred)
    assert found["dispreferred of a group"]["mean"] == np.mean([np.sum(~group.preferred) for group in groups])
    assert found["prompt length"]["mean"] == np.mean(built.prompt_lengths)
    assert found["prompt length"]["most"] == np.max(built.prompt_lengths)
    whole = build_dataset(data, make_tokenizer(LLAMA2), OPTIONS, cache_dir=tmp_path / "cache",
        selection=Selection(needs_preferred=False))  # fmt: skip
    assert found["response length"]["5%"] == np.quantile(whole.response_lengths, 0.05)
    assert train["responses"] == len(whole.response_lengths)
    scores = [np.sort(whole.group(i).scores) for i in range(len(whole))]
    assert found["gap between neighbouring scores"]["mean"] == np.mean(
        np.concatenate([np.diff(s) for s in scores])
    )
    assert found["score"]["95%"] == np.quantile(np.concatenate(scores), 0.95)
    by_score = train["lengths_by_score"]
    lengths = [np.array([len(ids) for ids in group.response_ids]) for group in groups]
    both = [0 < group.preferred.sum() < len(group.preferred) for group in groups]
    means = [
        (of[group.preferred].mean(), of[~group.preferred].mean())
        for of, group, is_there in zip(lengths, groups, both, strict=True)
        if is_there
    ]
    assert (by_score["preferred"], by_score["dispreferred"]) == pytest.approx(np.mean(means, axis=0))
    assert train["spacing"][-1]["n"] == max(map(len, scores)) == 5
    assert train["spacing"][0]["groups"] == 39


def test_preferences_are_those_of_the_noisy_scores(tmp_path: Path, model: Path, capsys: Any) -> None:
    data = good(tmp_path)
    keys = [
        *LIMITS,
        f"model.data.train={data}",
        f"model.restore_from_path={model}",
        "model.data.score_noise=3",
    ]
    _, _, figures = run(capsys, *keys)
    built = build_dataset(data, make_tokenizer(LLAMA2), OPTIONS, cache_dir=tmp_path / "cache",
        selection=Selection(score_noise=3, needs_preferred=False))  # fmt: skip
    preferred = [int(built.group(i).preferred.sum()) for i in range(len(built))]
    assert figures["train"]["distributions"]["preferred of a group"]["mean"] == np.mean(preferred)
    assert figures["train"]["distributions"]["score"]["most"] == 4.0


def test_validation_on_all_responses(tmp_path: Path, capsys: Any) -> None:
    """Of what training selects nothing is left in it."""
    data = good(tmp_path)
    keys = [f"model.data.{split}={data}" for split in ("train", "validation")]
    keys += ["model.data.keep_best=1", "model.data.keep_worst=1", "model.data.score_noise=3"]
    _, _, plain = run(capsys, *keys[:2])
    _, _, selected = run(capsys, *keys)
    _, _, on_all = run(capsys, *keys, "model.data.validate_on=all")
    names = ("preferred of a group", "dispreferred of a group")
    counts = [
        [figures[split]["distributions"][name] for name in names]
        for figures in (plain, selected, on_all)
        for split in ("train", "validation")
    ]
    assert counts[0] == counts[1] == counts[5]
    assert counts[2] == counts[3] == counts[4] != counts[0]


def test_what_is_there_twice(tmp_path: Path, capsys: Any) -> None:
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    same = [{"text": text, "score": 1.0} for text in ("Red.", " Red.", "Red.", "Blue.")]
    train.write_bytes(
        b"\n".join(
            [
                line("a"),
                line("b", prompt="Name a color."),
                line("c", prompt="Name a colour. "),
                line("d", responses=same),
            ]
        )
    )
    validation.write_bytes(
        b"\n".join([line("e", prompt="Name a number."), line("f", prompt="Name a color.")])
    )
    keys = [f"model.data.train={train}", f"model.data.validation={validation}"]
    _, output, figures = run(capsys, *keys)
    assert figures["train"]["duplicates"] == {"responses": 2, "groups": 1, "prompts": 2}
    assert figures["validation"]["duplicates"] == {
        "responses": 0, "groups": 0, "prompts": 0, "prompts_of_train": 1,
    }  # fmt: skip
    assert (
        "duplicates: 2 responses repeat another of their group (in 1 groups); 2 groups have the prompt"
        in output
    )
    assert "validation: 1 groups have a prompt of the training data, and so are not held out" in output


def test_every_fault_is_found_in_one_go(tmp_path: Path, model: Path, capsys: Any) -> None:
    named = [text.replace(b'"id": "x"', b'"id": "x%d"' % n) for n, (_, text, _) in enumerate(LINES.values())]
    data = tmp_path / "bad.jsonl"
    data.write_bytes(b"\n".join([line("g0"), *named, line("last")]))
    keys = [*LIMITS, f"model.data.train={data}", f"model.restore_from_path={model}"]
    report = tmp_path / "faults.jsonl"
    status, output, figures = run(capsys, *keys, "--report", str(report))
    counts = {fault: sum(of == fault for of, _, _ in LINES.values()) for fault, _, _ in LINES.values()}
    assert figures["train"]["faults"] == counts
    assert (status, figures["train"]["stops"]) == (1, True)
    # Those that are equal with one score are kept.
    assert figures["train"]["groups"] == 3
    noted = [json.loads(text) for text in report.read_text(encoding="utf-8").splitlines()]
    assert {(of["where"], of["fault"]) for of in noted} == {
        (f"{data}:{number}", fault) for number, (fault, _, _) in enumerate(LINES.values(), start=2)
    }
    for fault, count in counts.items():
        assert f"fault {fault}: {count} records" in output
    assert "fault score: 5 records (a run stops there), such as" in output
    skips = [f"model.data.faults.{field.name}=skip" for field in fields(FaultConfig)]
    status, _, figures = run(capsys, *keys, *skips, "model.data.truncation=skip")
    assert (status, figures["train"]["groups"], figures["train"]["faults"]) == (0, 2, counts)


def test_without_a_model_lengths_are_in_characters(tmp_path: Path, capsys: Any) -> None:
    status, output, figures = run(capsys, f"model.data.train={good(tmp_path)}")
    assert (status, figures["train"]["unit"]) == (0, "characters")
    assert figures["train"]["distributions"]["response length"]["most"] == len("Red ") * 5
    assert "lengths in characters" in output


def test_the_picture_shows_both_data_sets(tmp_path: Path, capsys: Any) -> None:
    data = good(tmp_path)
    path = tmp_path / "data.png"
    run(capsys, f"model.data.train={data}", "--picture", str(path))
    one = matplotlib.image.imread(path)
    run(capsys, f"model.data.train={data}", f"model.data.validation={data}", "--picture", str(path))
    both = matplotlib.image.imread(path)
    assert both.shape[0] > 1.5 * one.shape[0]
    assert one[..., :3].std() > 0.05


def test_data_without_a_preference_stop_a_run(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "ties.jsonl"
    data.write_bytes(line("a", responses=[{"text": "a", "score": 1}, {"text": "b", "score": 1}]))
    assert run(capsys, f"model.data.train={data}")[0] == 1
    keys = ["model.mpo.objective=infonca", "model.mpo.alpha=1"]
    assert run(capsys, f"model.data.train={data}", *keys)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.data.train=nothing.jsonl"], "error: there is no file or folder"),
        ([], "error: model.data.train has no value"),
        (["model.data.trian=x"], "error: unknown key model.data.trian; did you mean model.data.train?"),
        (
            ["model.data.train=x", "model.data.faults.score=keep"],
            "error: model.data.faults.score=keep is not known",
        ),
        (["model.data.train=x", "model.restore_from_path=nowhere"], "error: "),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: Any) -> None:
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(said)
    assert printed.err.count("\n") == 1
