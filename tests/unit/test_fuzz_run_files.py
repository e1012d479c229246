"""Whatever a file of comparisons or of rounds says: what is to be run, or one sentence with the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpo_megatron.comparison.plan import plan_runs, read_comparison
from mpo_megatron.errors import UserError
from mpo_megatron.rounds.config import read_config
from mpo_megatron.rounds.stages import plan_rounds
from tests.helpers.fuzzing import SCALARS, TEXT, TRIED, changed, check_message, damaged, tries

pytestmark = pytest.mark.usefixtures("inputs_are_counted")


# Stands for a model's folder.
FOLDER = "A-MODEL"
COMPARISON = {
    "seeds": [1],
    "common": {"trainer": {"max_steps": 3}, "model.restore_from_path": FOLDER},
    "members": {"dpo": {"objective": "dpo", "beta": 0.1}, "typed": ["model.mpo.alpha=0.1"]},
    "baseline": "dpo",
    "sweep": {"beta": [0.1], "sets": {"two": {"model.data.keep_best": 1}}},
    "samples": {"generate": {"prompts": "p.jsonl"}, "score": {}, "seeds": [1]},
}
ROUNDS = {
    "model": FOLDER,
    "rounds": 2,
    "seed": 1,
    "reference": "previous",
    "prompts": {"train": "t", "train_split": "a", "held_out": "h", "limit": 3},
    "sample": {"samples": 2, "top-p": 0.9},
    "held_out": {"samples": 2},
    "score": {"scorer": "constraints"},
    "log_probs": {"batch_size": 2},
    "train": {"config": "mpo_gpt", "ranks": 1, "overrides": {"trainer": {"max_steps": 3}}},
    "per_round": [None, {"model.optim.lr": 1e-6, "sample": {"samples": 4}}],
    "keep_checkpoints": False,
    "slurm": {"common": {"time": "1:00:00"}, "setup": ["module load cuda"]},
}
KEYS = st.sampled_from(
    ["seeds", "members", "common", "baseline", "sweep", "samples", "generate", "score", "objective", "beta", "trainer",
     "model", "model.mpo.beta", "model.optim.lr", "prompts", "train", "rounds", "per_round", "sample", "overrides",
     "config", "ranks", "limit", "slurm", "setup", "trainer.seed", "model.data.train"]
) | TEXT | st.integers() | st.booleans()  # fmt: skip
WORDS = st.sampled_from(
    ["dpo", "mpo", "previous", "first", "own", "all", "???", "${seeds}", "${nothing}", "${", "a=b", "model.optim.lr=1",
     "+a=1", "~a", "0.5", "[1,2]", "null", "../x", "start"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
PIECES = (b"\n", b":", b"[", b"{", b"- ", b"${", b"!!", b"&a", b"*a", b"\t", b"\xff")


def comparison(path: Path) -> None:
    found = read_comparison(path)
    runs = plan_runs(found, None, path.parent, ["model.data.validation=v"])
    assert len(runs) == len(found.members) * len(found.seeds)


def rounds(path: Path) -> None:
    config = read_config(path)
    if config.rounds < 100:
        plan_rounds(config, path.parent, [], [[]] * config.rounds)


def check(read: Callable[[Path], None], path: Path) -> None:
    try:
        read(path)
        TRIED["taken"] += 1
    except OSError:  # of a name that no file can have; the commands print these, too
        TRIED["refused"] += 1
    except UserError as error:
        check_message(error)
        TRIED["refused"] += 1


def write(content: Any, folder: Path) -> Path:
    """The file of it, with a model's folder that is there."""
    (folder / "config.json").touch()
    text = yaml.safe_dump(content, sort_keys=False).replace(FOLDER, str(folder))
    (folder / "file.yaml").write_text(text)
    return folder / "file.yaml"


@tries(120)
@given(content=changed(COMPARISON, VALUES) | VALUES)
def test_any_comparison(content: Any, tmp_path: Path) -> None:
    check(comparison, write(content, tmp_path))


@tries(120)
@given(content=changed(ROUNDS, VALUES) | VALUES)
def test_any_rounds(content: Any, tmp_path: Path) -> None:
    check(rounds, write(content, tmp_path))


@pytest.mark.parametrize(("content", "read"), [(COMPARISON, comparison), (ROUNDS, rounds)])
@tries(60)
@given(data=st.data())
def test_damaged_files(content: Any, read: Callable[[Path], None], data: Any, tmp_path: Path) -> None:
    path = write(content, tmp_path)
    path.write_bytes(data.draw(damaged(path.read_bytes(), PIECES)))
    check(read, path)


@pytest.mark.parametrize(("content", "read"), [(COMPARISON, comparison), (ROUNDS, rounds)])
def test_the_whole_files_are_taken(content: Any, read: Callable[[Path], None], tmp_path: Path) -> None:
    read(write(content, tmp_path))
