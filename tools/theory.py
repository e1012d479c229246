"""Check the paper's theory numerically, with the code that trains.

    python tools/theory.py [--output theory.png]

Gradients and first updates (Lemmas 5 and 6, Corollaries 2 and 3), where training ends (Lemma 10), how reliable a
partition and a full ranking are under noise (Theorem 2 and its bounds, simulated), and how the spacing of scores
shrinks as responses are added (Figure 10, on the example data). Prints each figure beside what the paper says, and
draws the two curves.
Exits with 1 if one is not as stated.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mpo_megatron.data.partition import partition_by_mean
from mpo_megatron.data.readers import read_groups
from mpo_megatron.errors import UserError
from mpo_megatron.objectives import GroupBatch
from mpo_megatron.objectives.listwise import infonca
from mpo_megatron.objectives.mpo import set_contrast
from mpo_megatron.ragged.groups import GroupIndex
from mpo_megatron.ragged.segments import Segments

DATA = Path(__file__).parents[1] / "examples" / "data" / "train.jsonl"
RESPONSES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Check:
    """A statement of the paper, what was found, and whether it is so."""

    statement: str
    found: str
    holds: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="theory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw the curves into this file")
    parser.add_argument("--data", type=Path, default=DATA, help="scored groups (the example data)")
    parser.add_argument("--draws", type=int, default=20_000, help="of the noise, for each n (20000)")
    parsed = parser.parse_args(arguments)
    try:
        spacings = reward_spacing(read_scores(parsed.data))
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    curves = [reliability(n, 1.0, parsed.draws) for n in RESPONSES]
    checks = [
        *gradient_checks(),
        stationary_check(),
        *reliability_checks(curves, parsed.draws),
        *spacing_checks(spacings),
    ]
    table = Table("statement", "found", "holds")
    for check in checks:
        table.add_row(check.statement, check.found, "yes" if check.holds else "NO")
    Console(width=max(110, Console().width)).print(table)
    if parsed.output:
        draw(curves, spacings, parsed.output)
        print(f"curves in {parsed.output}")
    return 0 if all(check.holds for check in checks) else 1


def _gradient(z: Tensor, preferred: Tensor) -> Tensor:
    """d loss / d z of one group, by autograd."""
    z = z.clone().requires_grad_()
    set_contrast(z, preferred, Segments.of([0] * len(z), 1)).sum().backward()
    assert z.grad is not None
    return z.grad


def _infonca_gradient(z: Tensor, scores: Tensor) -> Tensor:
    """d InfoNCA / d z of one group, by autograd; beta and alpha are 1 and the reference 0, so that z are log-probs."""
    z = z.clone().requires_grad_()
    batch = GroupBatch(
        policy_logps=z,
        reference_logps=torch.zeros_like(scores),
        lengths=torch.ones(len(z), dtype=torch.long),
        scores=scores,
        preferred=scores > scores.mean(),
        response_ids=torch.arange(len(z)),
        index=GroupIndex.of([len(z)]),
    )
    infonca(batch, beta=1.0, alpha=1.0).losses.sum().backward()
    assert z.grad is not None
    return z.grad


def gradient_checks() -> list[Check]:
    """Lemmas 5 and 6 at random logits; Corollaries 2 and 3 for the first step of gradient descent from zero."""
    generator = torch.Generator().manual_seed(0)
    largest = of_infonca = 0.0
    for n in RESPONSES:
        z, scores = torch.randn(2, n, dtype=torch.float64, generator=generator) * 5
        difference = _infonca_gradient(z, scores) - (z.softmax(0) - scores.softmax(0))
        of_infonca = max(of_infonca, float(difference.abs().max()))
        preferred = torch.arange(n) < max(1, n // 3)
        lemma = z.softmax(0) - torch.where(preferred, z, -torch.inf).softmax(0)
        largest = max(largest, float((_gradient(z, preferred) - lemma).abs().max()))
    checks = [
        Check(
            "Lemma 5: InfoNCA's d loss / d z = softmax(z) - softmax of the scores",
            f"differ by {of_infonca:.1e}",
            of_infonca < 1e-12,
        ),
        Check(
            "Lemma 6: d loss / d z = softmax - softmax over Y+", f"differ by {largest:.1e}", largest < 1e-12
        ),
    ]
    # w+ and w- enter as log-weights added to the logits: W-MPO's exp(alpha dW) (appendix D.2).
    for name, above, below, more, less in (
        ("Corollary 2", 3, 5, 1.7, 0.6),
        ("Corollary 3 (DPO)", 1, 1, 1.0, 1.0),
    ):
        weights = torch.tensor([more] * above + [less] * below, dtype=torch.float64)
        preferred = torch.arange(above + below) < above
        rate = 0.01
        step = -rate * _gradient(weights.log(), preferred)[:above]
        stated = rate * below * less / (above * (above * more + below * less))
        difference = float((step - stated).abs().max())
        checks.append(
            Check(
                f"{name}: the first update of a preferred score is {stated:.3g}",
                f"differs by {difference:.1e}",
                difference < 1e-15,
            )
        )
    return checks


def stationary_check(steps: int = 20_000, rate: float = 1.0) -> Check:
    """Lemma 10: gradient descent on the logits drives the dispreferred mass to 0 and the loss with it."""
    z = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    preferred = torch.tensor([True, False, True, False, False, False])
    for _ in range(steps):
        z -= rate * _gradient(z, preferred)
    mass = float(z.softmax(0)[~preferred].sum())
    loss = float(set_contrast(z, preferred, Segments.of([0] * 6, 1)))
    return Check(
        f"Lemma 10: dispreferred mass and loss vanish ({steps:,} steps of gradient descent)",
        f"mass {mass:.1e}, loss {loss:.1e}",
        mass < 1e-3 and loss < 1e-3,
    )


@dataclass(frozen=True)
class Reliability:
    """How often noise leaves the order of n equally spaced scores right.

    Attributes:
        sets: the better half is above the other half (the event of Theorem 2).
        mean: the responses above the mean are the same: the partition that is trained on.
        ranking: all of the order is right.
        sets_bound: from below, of `sets`; not of n.
        ranking_bound: from above, of `ranking`.
    """

    n: int
    sets: float
    mean: float
    ranking: float
    sets_bound: float
    ranking_bound: float


def reliability(n: int, beta: float, draws: int) -> Reliability:
    """Simulate spacing 1/n and noise beta/n (appendix F.1), and state the bounds of Theorem 4."""
    random = np.random.default_rng(n)
    true = np.arange(n) / n
    noisy = true + random.normal(scale=beta / n, size=(draws, n))
    half = n // 2
    sets = noisy[:, :half].max(1) < noisy[:, half:].min(1)
    mean = (partition_by_mean(noisy) == partition_by_mean(true[None])).all(1)
    ranking = (np.diff(noisy, axis=1) > 0).all(1)
    cdf = NormalDist().cdf
    flips = sum(m * cdf(-m / (math.sqrt(2) * beta)) for m in range(1, 200))
    in_order = cdf(1 / (math.sqrt(2) * beta))
    return Reliability(
        n,
        float(sets.mean()),
        float(mean.mean()),
        float(ranking.mean()),
        1 - flips,
        in_order ** ((n - 1) // 2),
    )


def reliability_checks(curves: Sequence[Reliability], draws: int) -> list[Check]:
    """Theorem 2: sets stay right with a probability above the bound at every n, rankings fall below theirs.

    The theorem compares the true halves. Training prefers what is above the mean of the noisy scores; noise moves that
    threshold, too, so the sets change more often, and as little with n.
    """
    largest = curves[-1]
    return [
        Check(
            f"Theorem 2: P(sets right) >= {curves[0].sets_bound:.3f} at every n, with noise of one spacing",
            ", ".join(f"n={curve.n}: {curve.sets:.3f}" for curve in curves),
            all(curve.sets >= curve.sets_bound for curve in curves),
        ),
        Check(
            "The same of the responses above the mean, which training prefers: bounded, too",
            ", ".join(f"n={curve.n}: {curve.mean:.3f}" for curve in curves),
            all(curve.mean >= largest.mean - 2 * _error(largest.mean, draws) for curve in curves),
        ),
        Check(
            "Theorem 2: P(ranking right) falls exponentially",
            ", ".join(f"n={curve.n}: {curve.ranking:.3g} <= {curve.ranking_bound:.3g}" for curve in curves),
            all(
                curve.ranking <= curve.ranking_bound + _error(curve.ranking_bound, draws) for curve in curves
            ),
        ),
    ]


def _error(probability: float, draws: int) -> float:
    """Three standard errors of a frequency."""
    return 3 * math.sqrt(probability * (1 - probability) / draws)


def read_scores(path: Path) -> list[list[float]]:
    """The scores of each group of a file, in any shape that the job trains on."""
    found = [[response.score for response in group.responses] for group in read_groups(path)]
    if not found:
        raise UserError(f"{path} holds no groups")
    return found


def reward_spacing(groups: Sequence[Sequence[float]]) -> dict[int, float]:
    """Mean spacing of adjacent scores by the number of responses, over all subsets of each group (Figure 10)."""
    spacings: dict[int, list[float]] = {}
    for scores in groups:
        for n in range(2, len(scores) + 1):
            found = [(max(chosen) - min(chosen)) / (n - 1) for chosen in itertools.combinations(scores, n)]
            spacings.setdefault(n, []).append(fmean(found))
    return {n: fmean(values) for n, values in sorted(spacings.items())}


def spacing_checks(spacings: dict[int, float]) -> list[Check]:
    """Figure 10: the more responses, the closer their scores."""
    values = list(spacings.values())
    return [
        Check(
            "Figure 10: the spacing of adjacent scores shrinks with n",
            ", ".join(f"n={n}: {value:.2f}" for n, value in spacings.items()),
            all(a > b for a, b in itertools.pairwise(values)),
        )
    ]


def draw(curves: Sequence[Reliability], spacings: dict[int, float], path: Path) -> None:
    """A PNG of both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    n = [curve.n for curve in curves]
    for name, label, style in (
        ("sets", "two sets (MPO)", "o-"),
        ("mean", "above the mean", "s--"),
        ("ranking", "ranking (Plackett-Luce)", "^-"),
    ):
        left.plot(n, [getattr(curve, name) for curve in curves], style, label=label)
    left.plot(n, [curve.sets_bound for curve in curves], ":", color="gray", label="bounds of Theorem 2")
    left.plot(n, [curve.ranking_bound for curve in curves], ":", color="gray")
    left.set(
        xscale="log", yscale="log", ylim=(1e-4, 1.5), xlabel="responses n", ylabel="P(right under noise)"
    )
    left.set_xticks(n, [str(size) for size in n])
    left.minorticks_off()
    left.legend()
    right.plot(list(spacings), list(spacings.values()), "o-")
    right.set(xlabel="responses n", ylabel="mean spacing of adjacent scores", ylim=(0, None))
    right.set_xticks(list(spacings))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
