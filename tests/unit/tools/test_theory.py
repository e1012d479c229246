"""The checks of the paper's theory: by hand where it can be, and what is wrong is found."""

import math
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from tools import theory


def test_all_of_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert theory.main(["--draws", "4000", "--output", str(tmp_path / "theory.png")]) == 0
    printed = capsys.readouterr().out
    assert "NO" not in printed
    assert printed.count("yes") == 9
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")


def test_a_clamped_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probabilities clamped from below, as in the code of appendix K, leave no gradient where they are small."""

    def clamped(z: torch.Tensor, preferred: torch.Tensor, *_: object) -> torch.Tensor:
        p = z.exp()
        return (p.sum().clamp(min=1e-10).log() - p[preferred].sum().clamp(min=1e-3 * p.sum().item()).log())[
            None
        ]

    monkeypatch.setattr(theory, "set_contrast", clamped)
    lemma_5, lemma_6, *_ = theory.gradient_checks()
    assert lemma_5.holds
    assert not lemma_6.holds


def test_two_responses_have_a_closed_form() -> None:
    """Spacing 1/2 and noise 1/2 on both: right if a normal variable of deviation sqrt(2) is below 1."""
    found = theory.reliability(2, 1.0, 40_000)
    exact = NormalDist().cdf(1 / math.sqrt(2))
    assert found.sets == found.mean == found.ranking
    assert abs(found.sets - exact) < 4 * math.sqrt(exact * (1 - exact) / 40_000)
    assert found.ranking_bound == 1.0
    assert theory.reliability(8, 1.0, 10).ranking_bound == pytest.approx(exact**3)


def test_less_noise_is_more_reliable() -> None:
    quiet, loud = theory.reliability(16, 0.3, 2000), theory.reliability(16, 1.0, 2000)
    assert quiet.sets > loud.sets
    assert quiet.sets_bound > loud.sets_bound


def test_spacing_by_hand() -> None:
    # Pairs of (0, 3, 9): spacings 3, 9, 6. All three: 9 / 2. The second group has two responses alone.
    assert theory.reward_spacing([[0.0, 9.0, 3.0], [1.0, 2.0]]) == {2: (6.0 + 1.0) / 2, 3: 4.5}


@pytest.mark.parametrize("content", ["{}", "[1]", "", "{", '{"responses": [{"score": 1}]}'])
def test_wrong_data_is_one_sentence(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    assert theory.main(["--data", str(tmp_path / "data.jsonl")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'data.jsonl'}")
    assert theory.main(["--data", str(tmp_path / "absent.jsonl")]) == 1
