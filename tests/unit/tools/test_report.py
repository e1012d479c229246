"""tools/report.py on a run's metrics and two scored files."""

import json
import math
import statistics
from pathlib import Path

import pytest

from tests.unit.tools.test_evaluate import scored
from tests.unit.tools.test_generate_score import write
from tools import report


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    lines = [
        {"split": split, "step": step, "accuracy": 0.5 + step / 10, "reward_margin": float(step)}
        for step, split in ((0, "validation"), (1, "train"), (2, "validation"))
    ]
    write(tmp_path / "metrics.jsonl", lines)
    return tmp_path


def run(experiment: Path, before: Path, after: Path) -> None:
    report.main(["--experiment", str(experiment), "--before", str(before), "--after", str(after)])


def test_before_and_after(experiment, tmp_path, capsys):
    before = scored(tmp_path / "before.jsonl", {"a": [1, 2], "b": [4], "c": [3]})
    after = scored(tmp_path / "after.jsonl", {"c": [5], "b": [4, 8], "a": [2]})
    run(experiment, before, after)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    gains = [0.5, 2, 2]
    assert (figures["steps"], figures["accuracy_after"], figures["reward_margin_after"]) == (2, 0.7, 2.0)
    assert figures["score_before"] == pytest.approx((1.5 + 4 + 3) / 3)
    assert figures["score_gain"] == pytest.approx(1.5)
    assert figures["score_gain_error"] == pytest.approx(statistics.stdev(gains) / math.sqrt(3))


def test_files_without_scores_and_of_other_prompts_are_one_sentence(experiment, tmp_path):
    before = scored(tmp_path / "before.jsonl", {"a": [1]})
    unscored = write(
        tmp_path / "unscored.jsonl",
        [{"id": "a", "prompt": "x", "responses": [{"text": "y", "finish_reason": "stop"}]}],
    )
    with pytest.raises(
        SystemExit, match=r"report\.py: .*unscored\.jsonl: group 'a' has a response with score=None"
    ):
        run(experiment, before, unscored)
    with pytest.raises(SystemExit, match=r"report\.py: the two files hold different prompts, first 'a'"):
        run(experiment, before, scored(tmp_path / "other.jsonl", {"b": [1]}))
