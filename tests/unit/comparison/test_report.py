"""Figures of runs and members by hand, and the tables and the picture that show them."""

import csv
import json
import math
from pathlib import Path

import pytest

from mpo_megatron.comparison.plan import Run
from mpo_megatron.comparison.report import plot, show, write_csv, write_markdown
from mpo_megatron.comparison.results import FIGURES, Figure, figures, over_seeds
from mpo_megatron.errors import UserError


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
    assert figures(path) == {
        "reward_margin_before": 0.0, "reward_margin_after": 0.1, "accuracy_before": 0.5, "accuracy_after": 0.75,
        "loss_before": 0.7, "loss_after": 0.6, "seconds_per_step": 2.0, "steps": 3,
    }  # fmt: skip
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match=r"has 1 validations, .* give model\.data\.validation"):
        figures(path)


def run(member: str, seed: int) -> Run:
    return Run(member, seed, (), Path("out") / member / f"seed-{seed}")


def result(margin: float) -> dict[str, float]:
    return {**dict.fromkeys(FIGURES, 0.25), "reward_margin_after": margin}


RESULTS = {run("dpo", seed): result(margin) for seed, margin in ((1, 1.0), (2, 2.0), (3, 6.0))}
FAILED = {run("mpo", 1): "a | b", run("mpo", 2): "[c]", run("dpo", 4): "d"}
LINES = [over_seeds("dpo", RESULTS, FAILED), over_seeds("mpo", RESULTS, FAILED)]


def test_means_and_standard_errors_over_seeds() -> None:
    dpo, mpo = LINES
    # Variance (4 + 1 + 9) / 2.
    assert dpo.figures["reward_margin_after"].mean == 3.0
    assert dpo.figures["reward_margin_after"].error == pytest.approx(math.sqrt(7 / 3))
    assert dpo.figures["loss_after"] == Figure(0.25, 0.0)
    assert (dpo.seeds, dpo.failed) == (3, {"dpo, seed 4": "d"})
    assert (mpo.seeds, mpo.figures, mpo.failed) == (0, {}, {"mpo, seed 1": "a | b", "mpo, seed 2": "[c]"})
    alone = over_seeds("dpo", {run("dpo", 1): result(1.0)}, {})
    assert alone.figures["reward_margin_after"] == Figure(1.0, None)


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(LINES, "title")
    printed = capsys.readouterr().out
    assert "+3.0000 ± 1.5" in printed
    assert "25.0% ± 0.0%" in printed
    for sentence in ("mpo, seed 1 failed: a | b", "mpo, seed 2 failed: [c]", "dpo, seed 4 failed: d"):
        assert sentence in printed.splitlines()
    write_markdown(LINES, "title", tmp_path / "table.md")
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {8}
    assert rows[2].startswith("| dpo | +0.2500 ± 0 | +3.0000 ± 1.5 | 25.0% ± 0.0% |")
    assert rows[3] == "| mpo | failed |" + "  |" * 5
    write_csv(LINES, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        dpo, mpo = csv.DictReader(file)
    assert (dpo["member"], dpo["seeds"], dpo["reward_margin_after"]) == ("dpo", "3", "3.0")
    assert float(dpo["reward_margin_after_error"]) == pytest.approx(1.5275, abs=1e-4)
    assert (mpo["seeds"], mpo["loss_after"], mpo["failed"]) == (
        "0",
        "",
        "mpo, seed 1: a | b; mpo, seed 2: [c]",
    )


def test_the_picture(tmp_path: Path) -> None:
    plot(LINES, "title", tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
