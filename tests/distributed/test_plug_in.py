"""The example of a foreign training loop: the same losses at every layout, and they fall."""

import math
from typing import Any

import numpy as np
import pytest

from examples.plug_into_megatron import main, random_group


@pytest.fixture(scope="module")
def one_rank(ranks: Any) -> list[float]:
    return ranks(1).run(main)[0]


@pytest.mark.parametrize(
    ("world", "sizes"), [(2, {}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {"cp": 2}), (4, {"tp": 2, "cp": 2})]
)
def test_layouts_train_alike(world: int, sizes: dict[str, int], one_rank: list[float], ranks: Any) -> None:
    for losses in ranks(world).run(main, **sizes):
        # Megatron draws the weights of a later stage from the generator's state of that stage, so not those of one
        # rank.
        compared = losses[:1] if "pp" in sizes else losses
        # Adam makes the most of rounding.
        assert compared == pytest.approx(one_rank[: len(compared)], rel=1e-3)
        assert losses[-1] < 0.2 * losses[0]


def test_the_first_loss_is_that_of_the_counts(one_rank: list[float]) -> None:
    groups = [random_group(number) for number in range(16)]
    expected = np.mean([math.log(len(g.scores) / g.preferred.sum()) for g in groups])
    assert one_rank[0] == pytest.approx(expected, abs=1e-6)
