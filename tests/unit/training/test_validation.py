"""The files that validations write, where a run goes on before them or the disk is full."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpo_megatron.data import GroupList, TokenizedGroup
from mpo_megatron.errors import UserError
from mpo_megatron.training.validation import drop_after, path_of, write_groups


def test_what_was_written_after_the_step_is_dropped(tmp_path: Path) -> None:
    drop_after(tmp_path, 3)
    for step in (0, 3, 4, 10):
        path_of(tmp_path, step).parent.mkdir(exist_ok=True)
        path_of(tmp_path, step).touch()
    drop_after(tmp_path, 3)
    assert sorted((tmp_path / "validation").iterdir()) == [path_of(tmp_path, 0), path_of(tmp_path, 3)]
    drop_after(tmp_path, -1)
    assert not list((tmp_path / "validation").iterdir())


def split() -> Any:
    groups = [
        TokenizedGroup(
            id=name,
            prompt_ids=np.zeros(3, dtype=np.int64),
            response_ids=[np.zeros(length, dtype=np.int64) for length in lengths],
            scores=np.arange(len(lengths), dtype=np.float64),
            preferred=np.arange(len(lengths)) > 0,
        )
        for name, lengths in (("a", [1, 2]), ("b", [3, 4, 5]), ("c", [6, 7]))
    ]
    return SimpleNamespace(dataset=GroupList(groups), steps=[np.array([2]), np.array([1])])


def test_the_responses_of_the_groups_of_the_steps(tmp_path: Path) -> None:
    """Of the first group none: it is in no step."""
    path = path_of(tmp_path, 7)
    write_groups(path, split(), torch.stack((torch.arange(7.0), -torch.arange(7.0))))
    c, b = (json.loads(line) for line in path.read_text().splitlines())
    assert c == {
        "id": "c", "logps": [5, 6], "rewards": [-5, -6], "tokens": [6, 7], "scores": [0, 1], "preferred": [False, True],
    }  # fmt: skip
    assert (b["id"], b["logps"], b["tokens"]) == ("b", [2, 3, 4], [3, 4, 5])


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "validation").touch()
    with pytest.raises(
        UserError, match=r"step_0000007\.jsonl cannot be written \(.*set trainer\.log_val_groups=false"
    ):
        write_groups(path_of(tmp_path, 7), split(), torch.zeros(2, 7))
