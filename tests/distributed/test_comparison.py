"""What the main job says before its first step, objective by objective, and the command that compares objectives."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from mpo_megatron.comparison.held_out import read_held_out
from mpo_megatron.data import Selection, TokenizeOptions, build_dataset
from tests.helpers.main_job import arguments, job, make_inputs, metrics
from tests.helpers.models import hugging_face_logps
from tests.helpers.warm import WarmPython
from tools import compare_objectives

VALIDATION_STEPS, BATCH = 3, 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the validation groups the second has equal scores."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs = make_inputs(folder, groups=(8, 10))
    validation = inputs["validation"]
    groups = [json.loads(line) for line in validation.read_text().splitlines()]
    for response in groups[1]["responses"]:
        response["score"] = 3.0
    validation.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return inputs


@pytest.fixture(scope="module")
def by_transformers(inputs: dict[str, Path]) -> list[list[tuple[float, int, float]]]:
    """For each validation group, log-prob, tokens and score of its responses."""
    options = TokenizeOptions(max_prompt_length=256, max_length=512)
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    dataset = build_dataset(
        inputs["validation"], tokenizer, options, cache_dir=inputs["cache"], selection=Selection(needs_preferred=False)
    )  # fmt: skip
    groups = [dataset.group(i) for i in range(len(dataset))]
    logps = iter(hugging_face_logps(inputs["model"], groups, torch.float64).tolist())
    return [
        [(next(logps), len(ids), score) for ids, score in zip(group.response_ids, group.scores, strict=True)]
        for group in groups
    ]


def reward_of(name: str, logp: float, tokens: int) -> float:
    mean = logp / tokens
    return {
        "simpo": 2.5 * mean,
        "mpo_reference_free": 2.0 * mean,
        "orpo": mean - math.log(1 - math.exp(mean)),
        "sft": mean,
    }[name]


def expected(groups: list[list[tuple[float, int, float]]], name: str) -> dict[str, float]:
    """Margin and accuracy by their definition: preferred is what scores above the group's mean."""
    margins, accuracies = [], []
    for group in groups:
        mean = sum(score for *_, score in group) / len(group)
        above = [reward_of(name, logp, tokens) for logp, tokens, score in group if score > mean]
        below = [reward_of(name, logp, tokens) for logp, tokens, score in group if score <= mean]
        margins.append(sum(above) / len(above) - sum(below) / len(below) if above else 0.0)
        accuracies.append(float(np.mean([a > b for a in above for b in below])) if above else 0.5)
    return {"reward_margin": float(np.mean(margins)), "accuracy": float(np.mean(accuracies))}


SETTINGS = {
    "simpo": ["model.mpo.beta=2.5", "model.mpo.gamma=0.5", "model.mpo.alpha=null"],
    "mpo_reference_free": ["model.mpo.beta=2", "model.mpo.gamma=0.5", "model.mpo.alpha=null"],
    "orpo": ["model.mpo.beta=0.1", "model.mpo.alpha=null"],
    "sft": ["model.mpo.beta=null", "model.mpo.alpha=null"],
    "sppo": ["model.mpo.beta=0.001", "model.mpo.alpha=null"],
    "kto": ["model.mpo.beta=0.1", "model.mpo.alpha=null"],
}
# One step, so that validations are most of a run.
SHORT = ("trainer.max_steps=1", f"trainer.limit_val_batches={VALIDATION_STEPS}", f"model.global_batch_size={BATCH}",
         "trainer.val_check_interval=0", "trainer.save_at_end=false", 'model.export_path=""')  # fmt: skip


def before_training(
    name: str, inputs: dict[str, Path], ranks: Any, folder: Path, *more: str
) -> dict[str, Any]:
    """The first validation of the main job."""
    overrides = arguments(inputs, folder, *SHORT, f"model.mpo.objective={name}", *SETTINGS[name], *more)
    assert ranks(2).run(job, overrides, timeout=240) == ["", ""]
    line = metrics(folder, "validation")[0]
    assert line["step"] == 0
    return line


def by_response(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / "validation" / "step_0000000.jsonl").read_text().splitlines()
    ]


def check_responses(
    found: list[dict[str, Any]], groups: list[list[tuple[float, int, float]]], rewards: list[list[float]]
) -> None:
    """What a validation has written of each response."""
    assert len(found) == len(groups)
    for line, group, of in zip(found, groups, rewards, strict=True):
        logps, tokens, scores = zip(*group, strict=True)
        assert line["logps"] == pytest.approx(logps, abs=2e-4)
        assert line["rewards"] == pytest.approx(of, abs=2e-4)
        assert (line["tokens"], line["scores"]) == (list(tokens), list(scores))
        assert line["preferred"] == [score > np.mean(scores) for score in scores]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("simpo", ""), ("mpo_reference_free", "tensor"), ("orpo", "pipeline")],
)
def test_margins_without_a_reference(
    name: str, layout: str, inputs: dict[str, Path], by_transformers: Any, ranks: Any, tmp_path: Path
) -> None:
    """Over the groups that have a preferred response: not the second one."""
    groups = (by_transformers[:1] + by_transformers[2:])[: VALIDATION_STEPS * BATCH]
    more = [f"model.{layout}_model_parallel_size=2"] if layout else []
    found = before_training(name, inputs, ranks, tmp_path, *more, "trainer.log_val_groups=true")
    rewards = [[reward_of(name, logp, tokens) for logp, tokens, _ in group] for group in groups]
    check_responses(by_response(tmp_path), groups, rewards)
    assert {key: found[key] for key in ("reward_margin", "accuracy")} == pytest.approx(
        expected(groups, name), abs=1e-5
    )
    assert abs(found["reward_margin"]) > 0.01


def test_margins_of_sft_with_and_without_groups_of_equal_scores(
    inputs: dict[str, Path], by_transformers: Any, ranks: Any, tmp_path: Path
) -> None:
    """Such a group has a best response and counts; required preferences leave it out, as for the other objectives."""
    count = VALIDATION_STEPS * BATCH
    some = (by_transformers[:1] + by_transformers[2:])[:count]
    for groups, more in ((by_transformers[:count], []), (some, ["model.data.require_preferred=true"])):
        found = before_training("sft", inputs, ranks, tmp_path / str(len(more)), *more)
        best = [max(group, key=lambda response: response[2]) for group in groups]
        wanted = {
            **expected(groups, "sft"),
            "loss": float(np.mean([-logp / tokens for logp, tokens, _ in best])),
        }
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "selection"),
    [("sppo", ["score_noise=9", "keep_first=2"]), ("kto", ["keep_best=1", "keep_worst=1"])],
)
def test_margins_with_a_reference_are_zero(
    name: str,
    selection: list[str],
    inputs: dict[str, Path],
    by_transformers: Any,
    ranks: Any,
    tmp_path: Path,
) -> None:
    """Whatever the run trains on, it can be measured by all held-out responses and their own scores."""
    settings = [*selection, "validate_on=all", "require_preferred=true"]
    more = [f"model.data.{setting}" for setting in settings]
    found = before_training(name, inputs, ranks, tmp_path, *more, "trainer.log_val_groups=true")
    assert (found["reward_margin"], found["accuracy"]) == (0.0, 0.5)
    groups = (by_transformers[:1] + by_transformers[2:])[: VALIDATION_STEPS * BATCH]
    check_responses(by_response(tmp_path), groups, [[0.0] * len(group) for group in groups])


def test_groups_that_say_nothing_cannot_be_kept(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    (error,) = ranks(1).run(job, arguments(inputs, tmp_path, "model.data.require_preferred=false"))
    assert error.startswith(
        "model.data.require_preferred=false: a group without a preferred response says nothing to"
    )


MPO = Path("out/mpo-prompts_long/seed-7")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command(
    inputs: dict[str, Path],
    warm_python: WarmPython,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two members at two points, one of which the job refuses, and samples; then again, and what changed is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(warm_python.python))
    for name, value in warm_python.environment.items():
        monkeypatch.setenv(name, value)
    prompts = [
        {"id": f"p{n}", "prompt": f"Name {n} colours.", "constraints": [{"type": "has_number"}]}
        for n in range(3)
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    content = {
        "seeds": [7],
        "common": [f"model.restore_from_path={inputs['model']}", f"model.data.train={inputs['train']}",
                   f"model.data.validation={inputs['validation']}", *SHORT],
        "members": {
            "infonca": {"objective": "infonca", "beta": 0.1, "alpha": 2.0},
            "mpo": {"objective": "mpo", "beta": 0.1},
        },
        "baseline": "mpo",
        "sweep": {"prompts": {"long": {}, "short": {"model.data.max_prompt_length": 1}}},
        "samples": {"generate": {"prompts": "prompts.jsonl", "samples": 2, "max-new-tokens": 4}},
    }  # fmt: skip
    Path("some.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    command = ["some.yaml", "--output", "out", "trainer.log_every_n_steps=1"]
    more = ["--members", "infonca,mpo-prompts_long"]
    assert compare_objectives.main([*command, *more]) == 1
    printed = capfd.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[:4]] == [
        "samples of the starting model", "[1/3] infonca-prompts_long, seed 7", "[2/3] infonca-prompts_short, seed 7",
        "[3/3] mpo-prompts_long, seed 7",
    ]  # fmt: skip
    assert "failed: " in printed.splitlines()[2]
    assert "max_prompt_length" in printed.splitlines()[2]
    with open("out/comparison.csv") as file:
        infonca, short, mpo = csv.DictReader(file)
    assert infonca["reward_margin_before"] == mpo["reward_margin_before"] == "0.0"
    assert infonca["reward_margin_after"] != "0.0"
    assert float(mpo["log_ratio_margin"]) == pytest.approx(10 * float(mpo["reward_margin_after"]), rel=1e-4)
    assert float(mpo["accuracy_after"]) == pytest.approx(np.mean(read_held_out(MPO / "experiment").accuracy))
    assert short["failed"].startswith("infonca-prompts_short, seed 7: ")
    assert infonca["score_before"] == mpo["score_before"] != ""
    pictures = {"comparison.png", "sweep-prompts.png"}
    assert {path.name for path in Path("out").iterdir()} >= {
        "comparison.md",
        "comparison-paired.csv",
        *pictures,
    }
    with open("out/comparison-paired.csv") as file:
        pairs = {line["of"]: line for line in csv.DictReader(file)}
    assert pairs.keys() == {"accuracy", "margin", "score"}
    margins = [float(line["log_ratio_margin"]) for line in (infonca, mpo)]
    assert float(pairs["margin"]["mean"]) == pytest.approx(margins[0] - margins[1])
    assert (pairs["margin"]["groups"], pairs["score"]["groups"], pairs["margin"]["over_seeds"]) == (
        "6",
        "3",
        "",
    )
    # One reference of the training data and one of the validation data, for both; models are gone when sampled.
    assert len(list(Path("out/cache/reference").iterdir())) == 2
    assert not (MPO / "model").exists()

    assert compare_objectives.main([*command, "--members", "mpo-prompts_long,infonca-prompts_long"]) == 0
    assert [": kept, " in line for line in capfd.readouterr().out.splitlines()[1:3]] == [True, True]
    assert compare_objectives.main([*command, "--members", "mpo-prompts_long", "model.mpo.beta=0.2"]) == 1
    assert capfd.readouterr().err.startswith(
        f"error: {MPO} was run with model.mpo.beta=0.1, and now it is model.mpo.beta=0.2: remove that folder"
    )
