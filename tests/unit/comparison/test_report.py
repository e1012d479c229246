"""Figures of runs and members by hand, and the tables and the pictures that show them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from mpo_megatron.comparison.paired import Difference
from mpo_megatron.comparison.pictures import plot, plot_sweep
from mpo_megatron.comparison.plan import Run
from mpo_megatron.comparison.report import (
    Pair,
    paired_table,
    show,
    table,
    write_csv,
    write_markdown,
    write_paired_csv,
)
from mpo_megatron.comparison.results import FIGURES, figures, over_seeds
from mpo_megatron.errors import UserError
from mpo_megatron.means import Mean

GROUP: dict[str, Any] = {"id": "a", "tokens": [2, 3], "scores": [2, 1], "preferred": [True, False]}


def write_groups(folder: Path, step: int, *groups: dict[str, Any]) -> None:
    path = folder / "validation" / f"step_{step:07d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))


def test_figures_of_a_run(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "split": "validation", "reward_margin": 0.0, "accuracy": 0.5, "loss": 0.7},
        {"step": 1, "split": "train", "seconds": 9.0},
        {"step": 2, "split": "validation", "reward_margin": 9.0, "accuracy": 0.9, "loss": 9.0},
        {"step": 2, "split": "train", "seconds": 1.0},
        {"step": 3, "split": "train", "seconds": 2.0},
        {"step": 3, "split": "validation", "reward_margin": 0.1, "accuracy": 0.75, "loss": 0.6},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, logps in ((0, [-1.0, -2.0]), (2, [7.0, 7.0]), (3, [-1.5, -5.0])):
        write_groups(tmp_path, step, {**GROUP, "logps": logps})
    # Log-ratios -0.5 and -3: the sum -3.5 over 5 tokens.
    assert figures(tmp_path) == {
        "reward_margin_before": 0.0, "reward_margin_after": 0.1, "accuracy_before": 0.5, "accuracy_after": 0.75,
        "loss_before": 0.7, "loss_after": 0.6, "log_ratio_margin": 2.5, "divergence": 0.7, "seconds_per_step": 2.0,
        "steps": 3,
    }  # fmt: skip
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match=r"has 1 validations, .* give model\.data\.validation"):
        figures(tmp_path)


def run(member: str, seed: int) -> Run:
    return Run(member, seed, (), Path("out") / member / f"seed-{seed}")


def result(margin: float) -> dict[str, float]:
    return {**dict.fromkeys(FIGURES, 0.25), "reward_margin_after": margin}


RESULTS = {run("dpo", seed): result(margin) for seed, margin in ((1, 1.0), (2, 2.0), (3, 6.0))}
FAILED = {run("mpo", 1): "a | b", run("mpo", 2): "[c]", run("dpo", 4): "d"}
LINES = [over_seeds("dpo", RESULTS, FAILED), over_seeds("mpo", RESULTS, FAILED)]
START = {"p": 1.0, "q": 5.0, "r": 3.0}
SCORES = {
    run("dpo", 1): {"p": 2.0, "q": 5.0, "r": 5.0},
    run("dpo", 2): {"p": 2.0, "q": 7.0, "r": 5.0},
}
SAMPLED = over_seeds("dpo", RESULTS, {}, START, SCORES)


def test_means_and_standard_errors_over_seeds() -> None:
    dpo, mpo = LINES
    # Variance (4 + 1 + 9) / 2.
    assert dpo.figures["reward_margin_after"].mean == 3.0
    assert dpo.figures["reward_margin_after"].error == pytest.approx(math.sqrt(7 / 3))
    assert dpo.figures["loss_after"] == Mean(0.25, 0.0)
    assert (dpo.seeds, dpo.failed) == (3, {"dpo, seed 4": "d"})
    assert (mpo.seeds, mpo.figures, mpo.failed) == (0, {}, {"mpo, seed 1": "a | b", "mpo, seed 2": "[c]"})
    alone = over_seeds("dpo", {run("dpo", 1): result(1.0)}, {})
    assert alone.figures["reward_margin_after"] == Mean(1.0, None)


def test_scores_are_over_prompts_and_the_gain_is_prompt_by_prompt() -> None:
    # After, mean over the two seeds: 2, 6, 5; gains 1, 1, 2.
    found = SAMPLED.figures
    assert found["score_before"].mean == 3.0
    assert found["score_gain"].mean == pytest.approx(4 / 3)
    assert found["score_after"].mean == pytest.approx(13 / 3)
    assert found["score_before"].error == pytest.approx(2 / math.sqrt(3))
    assert found["score_gain"].error == pytest.approx(1 / 3)
    assert "score_gain" not in over_seeds("mpo", RESULTS, {}, START, {run("mpo", 1): START}).figures


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = table(LINES, "title")
    show(grid)
    printed = capsys.readouterr().out
    assert "± 1.5" in printed
    assert "25.0% ± 0.0%" in printed
    for sentence in ("mpo, seed 1 failed: a | b", "mpo, seed 2 failed: [c]", "dpo, seed 4 failed: d"):
        assert sentence in printed.splitlines()
    write_markdown([grid], tmp_path / "table.md")
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {11}
    assert rows[2].startswith("| dpo | 3 | +0.2500 ± 0 | +3.0000 ± 1.5 | 25.0% ± 0.0% |")
    assert rows[3] == "| mpo | 0 | failed |" + "  |" * 7
    write_csv(LINES, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        dpo, mpo = csv.DictReader(file)
    assert (dpo["member"], dpo["seeds"], dpo["reward_margin_after"]) == ("dpo", "3", "3.0")
    assert float(dpo["reward_margin_after_error"]) == pytest.approx(1.5275, abs=1e-4)
    assert (mpo["seeds"], mpo["loss_after"], mpo["score_gain"], mpo["failed"]) == (
        "0", "", "", "mpo, seed 1: a | b; mpo, seed 2: [c]",
    )  # fmt: skip


def test_the_table_with_samples() -> None:
    titles, sampled, other = table([SAMPLED, LINES[0]], "title").rows
    assert dict(zip(titles, sampled, strict=True))["gain"] == "+1.333 ± 0.33"
    assert dict(zip(titles, other, strict=True))["gain"] == ""


def test_the_table_of_differences(tmp_path: Path) -> None:
    pairs = [
        Pair(
            "mpo",
            "dpo",
            {
                "accuracy": Difference(0.05, 0.03, 0.01, 76, 3),
                "margin": Difference(-1.0, 0.5, None, 76, 1),
            },
        ),
        Pair("kto", "dpo", {}),
    ]
    grid = paired_table(pairs)
    assert grid.rows == [
        ["member", "less", "groups", "seeds", "log-ratio accuracy", "log-ratio margin, nats"],
        ["mpo", "dpo", "76", "1", "+5.0% ± 3.0% / 1.0%", "-1.000 ± 0.5 / –"],
        ["kto", "dpo", "", "", "", ""],
    ]
    write_paired_csv(pairs, tmp_path / "paired.csv")
    with (tmp_path / "paired.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["of"], first["over_groups"], second["over_seeds"], second["error"]) == (
        "accuracy", "0.03", "", "0.5",
    )  # fmt: skip
    assert float(first["error"]) == pytest.approx(math.sqrt(0.001))


def ink(path: Path) -> int:
    """Coloured points of a picture."""
    image = matplotlib.image.imread(path)[..., :3]
    return int((image.max(-1) - image.min(-1) > 0.3).sum())


def test_the_picture(tmp_path: Path) -> None:
    plot(LINES, "title", tmp_path / "without.png")
    plot([SAMPLED, *LINES], "title", tmp_path / "with.png")
    assert 0 < ink(tmp_path / "without.png") < ink(tmp_path / "with.png")


@pytest.mark.parametrize("values", [[0.01, 1.0], [0, 2], ["mean", None]])
def test_the_picture_of_a_sweep(values: list[Any], tmp_path: Path) -> None:
    """A member that has no figures, or was not run, leaves a gap."""
    names = [f"dpo-{value}" for value in values]
    lines = {name: over_seeds("dpo", RESULTS, {}) for name in names} | {"mpo": LINES[1]}
    curves = {"dpo": list(zip(values, names, strict=True)), "mpo": [(values[0], "mpo"), (values[1], "none")]}
    plot_sweep(lines, "beta", curves, "title", tmp_path / "two.png")
    plot_sweep(lines, "beta", {**curves, "dpo": curves["dpo"][:1]}, "title", tmp_path / "one.png")
    assert 0 < ink(tmp_path / "one.png") < ink(tmp_path / "two.png")
