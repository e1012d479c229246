"""Which prompts each round has, and those that all are measured on."""

from pathlib import Path

import numpy as np

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.records import Record, read_prompts, write_jsonl
from mpo_megatron.rounds.config import PromptsConfig


def split_prompts(config: PromptsConfig, rounds: int, seed: int) -> tuple[list[Record], list[list[Record]]]:
    """(the held-out prompts, those of each round).

    Prompts of their own are drawn without being put back. With a `limit` the first rounds have the same ones whatever
    the number of rounds is.

    Raises:
        UserError: a file cannot be read, holds too few prompts, or one is held out and trained on.
    """
    held_out = _read(config.held_out, config.held_out_split, "held_out")[: config.held_out_limit]
    train = _read(config.train, config.train_split, "train")
    common = {record["id"] for record in held_out} & {record["id"] for record in train}
    if common:
        raise UserError(
            f"prompts: {len(common)} are held out and trained on, first {min(common)!r}; give other files or splits"
        )
    if config.each_round == "all":
        return held_out, [train[: config.limit]] * rounds
    order = np.random.default_rng(seed).permutation(len(train))
    if config.limit is None:
        parts = np.array_split(order, rounds)
    else:
        parts = [order[i * config.limit : (i + 1) * config.limit] for i in range(rounds)]
    smallest = min(map(len, parts))
    if smallest < (config.limit or 1):
        raise UserError(
            f"prompts: {config.train} has {len(train)} for {rounds} rounds of {config.limit or 'at least 1'}; lower "
            "prompts.limit or rounds, or set prompts.each_round=all"
        )
    return held_out, [[train[i] for i in sorted(part)] for part in parts]


def _read(path: str, split: str | None, key: str) -> list[Record]:
    records = read_prompts(Path(path))
    chosen = [record for record in records if split is None or record.get("split") == split]
    if not chosen:
        raise UserError(f'prompts.{key}={path} has no prompt with "split": "{split}"; leave {key}_split out')
    return chosen


def write_prompts(path: Path, records: list[Record]) -> None:
    """Write a file of prompts, unless it is there with the same ones."""
    if not path.is_file() or read_prompts(path) != records:
        write_jsonl(path, records)
