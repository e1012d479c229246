"""What runs have changed of held-out groups, and differences between members, by hand and on drawn numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_megatron.comparison.held_out import read_held_out
from mpo_megatron.comparison.paired import difference
from mpo_megatron.errors import UserError
from tests.unit.comparison.test_report import GROUP, write_groups


def group(name: str, logps: list[float], preferred: list[bool]) -> dict[str, Any]:
    return {"id": name, "logps": logps, "tokens": [4] * len(logps), "preferred": preferred}


def test_log_ratios_of_each_group(tmp_path: Path) -> None:
    """Of the preferred one response rises, one falls as the dispreferred do; a group of one kind does not count."""
    two, one = [True, False, True], [False, False]
    write_groups(tmp_path, 0, group("a", [-8.0, -9.0, -7.0], two), group("b", [-1.0, -1.0], one))
    write_groups(tmp_path, 12, group("a", [-6.0, -10.0, -8.0], two), group("b", [-5.0, -9.0], one))
    found = read_held_out(tmp_path)
    assert found.ids == ["a"]
    # Log-ratios 2, -1, -1: the pairs are one right and one tie.
    assert found.accuracy.tolist() == [0.75]
    assert found.margin.tolist() == [1.5]
    assert found.divergence == 0.0


def test_runs_that_have_not_written_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 validations, .*leave trainer\.log_val_groups as it is"):
        read_held_out(tmp_path)
    write_groups(tmp_path, 0, {**GROUP, "logps": [1, 2]})
    write_groups(tmp_path, 3, {**GROUP, "id": "b", "logps": [1, 2]})
    with pytest.raises(UserError, match=r"are of other groups; remove the run's folder"):
        read_held_out(tmp_path)


def test_a_difference_by_hand() -> None:
    member = {1: {"a": 1.0, "b": 2.0, "c": 9.0}, 2: {"b": 5.0, "a": 2.0}, 3: {"a": 7.0, "b": 7.0}}
    baseline = {1: {"a": 0.0, "b": 0.0, "c": 0.0}, 2: {"a": 0.0, "b": 0.0}}
    found = difference(member, baseline)
    # Of the groups 1.5 and 3.5, of the seeds 1.5 and 3.5; c and the third seed are not in both.
    assert found is not None
    assert (found.mean, found.groups, found.seeds) == (2.5, 2, 2)
    assert found.over_groups == pytest.approx(1.0)
    assert found.over_seeds == pytest.approx(1.0)
    assert found.error == pytest.approx(math.sqrt(2))
    assert difference(member, {4: {"a": 1.0}}) is None
    assert difference(member, {1: {"d": 1.0}}) is None
    alone = difference({1: {"a": 1.0}}, {1: {"a": 0.5}})
    assert alone is not None
    assert (alone.mean, alone.over_groups, alone.over_seeds, alone.error) == (0.5, None, None, None)


def test_the_error_is_that_of_repeated_comparisons() -> None:
    """Groups, seeds and each value vary: the error of the mean difference is its deviation, at most a little larger."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        level = rng.normal(scale=50, size=40)
        values = rng.normal(scale=2, size=40) + rng.normal(scale=1, size=(6, 1)) + rng.normal(size=(6, 40))
        member = {seed: {str(g): level[g] + values[seed, g] for g in range(40)} for seed in range(6)}
        baseline = {seed: {str(g): level[g] for g in range(40)} for seed in range(6)}
        found = difference(member, baseline)
        assert found is not None
        assert found.error is not None
        means.append(found.mean)
        errors.append(found.error)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.1)
