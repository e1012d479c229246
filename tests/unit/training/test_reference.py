"""What of the log-probs on disk a run takes, and what becomes of it where the disk cannot be written."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_megatron.data import GroupList
from mpo_megatron.scheduling.plan import CostModel
from mpo_megatron.scheduling.rows import RowSource
from mpo_megatron.training.reference import Kept
from mpo_megatron.training.reference_cache import ReferenceCache
from tests.helpers.models import make_groups

SIZES = [2, 3, 2, 4]
STEPS = [[3, 0], [1]]  # responses 7 to 10, 0 and 1; and 2 to 4. Those of group 2 are in no step.
SOURCE = RowSource(
    GroupList(make_groups(SIZES, 50)), max_tokens=512, alignment=8, cost=CostModel(1e3, 1.0, 1e2)
)
LOGPS = -torch.arange(1.0, 12.0)


def computed(cache: ReferenceCache) -> Kept:
    """A pass to its end."""
    kept = Kept(cache, SOURCE, STEPS)
    for step in kept.left:
        kept.add(step, LOGPS)
    kept.finish()
    return kept


def test_a_run_goes_on_without_its_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    kept = computed(ReferenceCache("train", tmp_path / "file" / "reference", "key"))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"warning: {tmp_path}/file/reference/key.journal cannot be written (Not a directory), so the"
    )
    assert last.startswith(f"warning: {tmp_path}/file/reference/key.npy cannot be written")
    assert kept.values[[7, 10, 1, 4]].tolist() == [-8.0, -11.0, -2.0, -5.0]
    assert np.isnan(kept.values[[5, 6]]).all()


def test_a_whole_pass_leaves_its_log_probs_alone(tmp_path: Path) -> None:
    cache = ReferenceCache("train", tmp_path, "key")
    values = computed(cache).values
    assert [path.name for path in tmp_path.iterdir()] == ["key.npy"]
    again = Kept(cache, SOURCE, STEPS)
    assert again.left == []
    np.testing.assert_array_equal(again.values, values)


def test_a_stopped_pass_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ReferenceCache("train", tmp_path, "key")
    Kept(cache, SOURCE, STEPS).add(0, LOGPS)
    kept = Kept(cache, SOURCE, STEPS)
    assert kept.left == [1]
    assert "train: goes on after 1 of 2 steps" in capsys.readouterr().out
    kept.add(1, LOGPS)
    kept.finish()
    unbroken = computed(ReferenceCache("train", tmp_path / "other", "key"))
    np.testing.assert_array_equal(kept.values, unbroken.values)
    assert (tmp_path / "key.npy").read_bytes() == (tmp_path / "other" / "key.npy").read_bytes()
    assert not (tmp_path / "key.journal").exists()


def test_a_pass_that_gives_other_numbers_in_the_middle_starts_anew(tmp_path: Path) -> None:
    cache = ReferenceCache("train", tmp_path, "key", resumes=False)
    Kept(cache, SOURCE, STEPS).add(0, LOGPS)
    assert list(tmp_path.iterdir()) == []
    assert Kept(cache, SOURCE, STEPS).left == [0, 1]


def test_log_probs_of_other_rows_count_where_exactness_is_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = np.where(np.isin(np.arange(11), [2, 3, 4, 7]), -100.0, np.nan).astype(np.float32)
    np.save(tmp_path / "another.npy", part)
    assert Kept(ReferenceCache("train", tmp_path, "key"), SOURCE, STEPS).left == [0, 1]
    assert capsys.readouterr().out == ""
    kept = computed(ReferenceCache("train", tmp_path, "key", exact=False))
    assert "train: 4 of 9 log-probs are of other rows" in capsys.readouterr().out
    # Step 1 is all there; of step 0 only one response was, and a step's rows are computed together.
    assert kept.values[[2, 3, 4, 7, 0]].tolist() == [-100.0, -100.0, -100.0, -8.0, -1.0]
    assert {path.name for path in tmp_path.iterdir()} == {"another.npy", "key.mixed.npy"}
    assert Kept(ReferenceCache("train", tmp_path, "key", exact=False), SOURCE, STEPS).left == []
    # What holds another run's numbers is none of this run's own.
    assert Kept(ReferenceCache("train", tmp_path, "key"), SOURCE, STEPS).left == [0, 1]
