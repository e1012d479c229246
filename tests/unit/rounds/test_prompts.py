"""Prompts over rounds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mpo_megatron.errors import UserError
from mpo_megatron.rounds.config import PromptsConfig
from mpo_megatron.rounds.prompts import split_prompts, write_prompts


@pytest.fixture
def config(tmp_path: Path) -> PromptsConfig:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"id": f"p{i}", "split": "held" if i % 4 == 0 else "train", "prompt": f"Say {i}."} for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PromptsConfig(str(path), "train", str(path), "held")


def ids(records: list) -> list[str]:
    return [record["id"] for record in records]


def test_rounds_have_prompts_of_their_own(config: PromptsConfig) -> None:
    held_out, rounds = split_prompts(config, 4, 0)
    assert ids(held_out) == [f"p{i}" for i in range(0, 40, 4)]
    assert [len(part) for part in rounds] == [8, 8, 7, 7]
    assert sorted(name for part in rounds for name in ids(part)) == sorted(
        f"p{i}" for i in range(40) if i % 4
    )
    assert split_prompts(config, 4, 0)[1] == rounds
    assert split_prompts(config, 4, 1)[1] != rounds


def test_with_a_limit_more_rounds_leave_the_first_as_they_were(config: PromptsConfig) -> None:
    limited = replace(config, limit=5, held_out_limit=2)
    held_out, rounds = split_prompts(limited, 3, 0)
    assert ids(held_out) == ["p0", "p4"]
    assert [len(part) for part in rounds] == [5, 5, 5]
    assert split_prompts(limited, 6, 0)[1][:3] == rounds
    with pytest.raises(UserError, match="has 30 for 7 rounds of 5; lower"):
        split_prompts(limited, 7, 0)
    with pytest.raises(UserError, match="has 30 for 31 rounds of at least 1; lower"):
        split_prompts(config, 31, 0)


def test_all_prompts_in_each_round(config: PromptsConfig) -> None:
    _, rounds = split_prompts(replace(config, each_round="all"), 2, 0)
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) == 30


def test_what_is_held_out_is_not_trained_on(config: PromptsConfig) -> None:
    with pytest.raises(UserError, match="10 are held out and trained on, first 'p0'"):
        split_prompts(replace(config, train_split=None), 2, 0)
    with pytest.raises(UserError, match='has no prompt with "split": "test"; leave held_out_split out'):
        split_prompts(replace(config, held_out_split="test"), 2, 0)


def test_files_are_written_once(config: PromptsConfig, tmp_path: Path) -> None:
    _, rounds = split_prompts(config, 2, 0)
    path = tmp_path / "prompts" / "round-1.jsonl"
    write_prompts(path, rounds[0])
    before = path.stat().st_ino
    write_prompts(path, rounds[0])
    assert path.stat().st_ino == before
    write_prompts(path, rounds[1])
    assert ids([json.loads(line) for line in path.read_text().splitlines()]) == ids(rounds[1])
