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


def expected(groups: list[list[tuple[float, int, float]]], name: str) -> dict[str, float]:
    """Margin and accuracy by their definition: preferred is what scores above the group's mean."""
    rewards = {
        "simpo": lambda logp, tokens: 2.5 * logp / tokens,
        "mpo_reference_free": lambda logp, tokens: 2.0 * logp / tokens,
        "orpo": lambda logp, tokens: logp / tokens - math.log(1 - math.exp(logp / tokens)),
        "sft": lambda logp, tokens: logp / tokens,
    }
    margins, accuracies = [], []
    for group in groups:
        mean = sum(score for *_, score in group) / len(group)
        above = [rewards[name](logp, tokens) for logp, tokens, score in group if score > mean]
        below = [rewards[name](logp, tokens) for logp, tokens, score in group if score <= mean]
        margins.append(sum(above) / len(above) - sum(below) / len(below) if above else 0.0)
        accuracies.append(np.mean([a > b for a in above for b in below]) if above else 0.5)
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


@pytest.mark.parametrize("name", ["simpo", "mpo_reference_free", "orpo"])
def test_margins_without_a_reference(
    name: str, inputs: dict[str, Path], by_transformers: Any, ranks: Any, tmp_path: Path
) -> None:
    """Over the groups that have a preferred response: not the second one."""
    groups = (by_transformers[:1] + by_transformers[2:])[: VALIDATION_STEPS * BATCH]
    found = before_training(name, inputs, ranks, tmp_path)
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


@pytest.mark.parametrize("name", ["sppo", "kto"])
def test_margins_with_a_reference_are_zero(
    name: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    found = before_training(name, inputs, ranks, tmp_path)
    assert (found["reward_margin"], found["accuracy"]) == (0.0, 0.5)


def test_groups_that_say_nothing_cannot_be_kept(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    (error,) = ranks(1).run(job, arguments(inputs, tmp_path, "model.data.require_preferred=false"))
    assert error.startswith(
        "model.data.require_preferred=false: a group without a preferred response says nothing to"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command(
    inputs: dict[str, Path],
    warm_python: WarmPython,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two members that train on the same groups and one that the job refuses; then again, and what changed is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(warm_python.python))
    for name, value in warm_python.environment.items():
        monkeypatch.setenv(name, value)
    content = {
        "seeds": [7],
        "common": [f"model.restore_from_path={inputs['model']}", f"model.data.train={inputs['train']}",
                   f"model.data.validation={inputs['validation']}", *SHORT],
        "members": {
            "infonca": {"objective": "infonca", "beta": 0.1, "alpha": 2.0},
            "short": {"objective": "mpo", "beta": 0.1, "model.data.max_prompt_length": 1},
            "mpo": {"objective": "mpo", "beta": 0.1},
        },
    }  # fmt: skip
    Path("some.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    command = ["some.yaml", "--output", "out", "trainer.log_every_n_steps=1"]
    assert compare_objectives.main(command) == 1
    printed = capfd.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == [
        "[1/3] infonca, seed 7", "[2/3] short, seed 7", "[3/3] mpo, seed 7",
    ]  # fmt: skip
    assert "failed: " in printed.splitlines()[1]
    assert "max_prompt_length" in printed.splitlines()[1]
    with open("out/comparison.csv") as file:
        infonca, short, mpo = csv.DictReader(file)
    assert infonca["reward_margin_before"] == mpo["reward_margin_before"] == "0.0"
    assert infonca["reward_margin_after"] != "0.0"
    assert short["failed"].startswith("short, seed 7: ")
    assert {path.name for path in Path("out").iterdir()} >= {"comparison.md", "comparison.png", "cache"}
    # One reference of the training data and one of the validation data, for both.
    assert len(list(Path("out/cache/reference").iterdir())) == 2

    assert compare_objectives.main([*command, "--members", "mpo,infonca"]) == 0
    assert [": kept, " in line for line in capfd.readouterr().out.splitlines()[:2]] == [True, True]
    assert compare_objectives.main([*command, "--members", "mpo", "model.mpo.beta=0.2"]) == 1
    assert capfd.readouterr().err.startswith(
        "error: out/mpo/seed-7 was run with model.mpo.beta=0.1, and now it is model.mpo.beta=0.2: remove that folder"
    )
