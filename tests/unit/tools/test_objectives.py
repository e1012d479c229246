"""The printed table of objectives, and the README's, which is the same."""

from pathlib import Path

import pytest

from mpo_megatron.objectives import get, names
from tools import objectives

README = Path(__file__).parents[3] / "README.md"


def test_the_table_has_every_objective(capsys: pytest.CaptureFixture[str]) -> None:
    objectives.main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names())
    assert "label_smoothing=0" in printed


def test_rows_by_hand() -> None:
    assert objectives.row(get("wmpo"))[:4] == (
        "wmpo",
        "as mpo, responses weighted by their score's deviation",
        "yes",
        "beta, alpha, weighting=absolute (or signed)",
    )
    assert objectives.row(get("sft"))[2:4] == ("no", "none")
    assert objectives.row(get("dpo_all_pairs"))[3] == "beta, label_smoothing=0"
    assert objectives.row(get("ipo"))[3] == (
        "beta, pairs=best_worst (or best_random, all, cross), length_normalised=true"
    )


def test_the_readme_has_the_table_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    objectives.main(["--markdown"])
    assert capsys.readouterr().out in README.read_text(encoding="utf-8")
