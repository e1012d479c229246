"""Fresh samples on held-out prompts, and their scores: of each run's model, and once of the starting model.

    samples:
      generate: {prompts: examples/data/prompts.jsonl, split: validation, samples: 2, top-p: 0.85}
      score: {scorer: constraints}
      seeds: [1]              # of the runs whose models are sampled; left out: all

`generate` and `score` are the options of tools/generate.py and tools/score.py, which go on where they were killed.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.records import read_groups
from mpo_megatron.rollout.rewards import mean_score
from mpo_megatron.runtime.commands import ROOT, as_arguments, run_to_end, what_failed

# The folder of the starting model's samples, in the output.
START = "start"
GROUPS, SCORED, RECORD, LOG = "samples.jsonl", "samples.scored.jsonl", "samples.json", "samples.log"
# Options that the comparison gives.
_OWN = {"model", "output", "input"}


@dataclass(frozen=True)
class Samples:
    """How models are sampled and scored: options of the two tools, and the seeds of the runs whose models are."""

    generate: dict[str, Any]
    score: dict[str, Any]
    seeds: list[int]


def read_samples(section: Any, seeds: list[int]) -> Samples | None:
    """The section of a comparison file; None of none.

    Raises:
        UserError: it is not as above.
    """
    if section is None:
        return None
    keys = {"generate", "score", "seeds"}
    if not isinstance(section, dict) or "generate" not in section or not section.keys() <= keys:
        raise UserError(
            "samples must give `generate`, the options of tools/generate.py, such as {prompts: prompts.jsonl}, and may "
            "give `score` and `seeds`"
        )
    options = {name: section.get(name) or {} for name in ("generate", "score")}
    for name, of in options.items():
        if not isinstance(of, dict):
            raise UserError(f"samples.{name} must give options of tools/{name}.py by name, not {of}")
        for key in of:
            if str(key).replace("_", "-") in _OWN:
                raise UserError(f"samples.{name}.{key} is set by the comparison; remove it")
    if "prompts" not in options["generate"]:
        raise UserError("samples.generate has no prompts; give a JSONL file of held-out ones")
    chosen = section.get("seeds", seeds)
    if not isinstance(chosen, list) or any(seed not in seeds for seed in chosen):
        raise UserError(f"samples.seeds={chosen} must be some of seeds={seeds}")
    return Samples(options["generate"], options["score"], chosen)


def sample(samples: Samples, model: Path, folder: Path) -> dict[str, float]:
    """Sample a model and score what it said, or take what an earlier start has.

    Args:
        model: a Hugging Face folder; not looked for where there are scored samples.
        folder: where they go.

    Returns:
        The mean score of each prompt's samples, by the prompt's id.

    Raises:
        UserError: a tool failed; with its own sentence. Or the folder has samples that were made otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"generate": samples.generate, "score": samples.score}
    record = folder / RECORD
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before != settings:
            raise UserError(
                f"{folder} has samples that were made with {before}, and now it is {settings}: remove "
                f"{record.name} and samples*.jsonl* there to sample anew, or give another --output"
            )
    elif not (model / "config.json").is_file():
        raise UserError(
            f"{folder} has no model to sample: it was run without `samples`; remove it to run it anew"
        )
    record.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    scored = folder / SCORED
    if not is_sampled(folder):
        groups = folder / GROUPS
        if not groups.is_file():
            _tool("generate", {"model": model, **samples.generate, "output": groups}, folder / LOG)
        _tool("score", {"input": groups, **samples.score, "output": scored}, folder / LOG)
    return {group["id"]: mean_score(group) for group in read_groups(scored, constraints=False)}


def is_sampled(folder: Path) -> bool:
    """Whether there are scored samples."""
    return (folder / SCORED).is_file()


def discard(model: Path) -> None:
    """Remove a model that was kept for its samples alone."""
    shutil.rmtree(model, ignore_errors=True)


def _tool(name: str, options: Mapping[str, Any], log: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *as_arguments(options)]
    with log.open("wb") as file:
        status = run_to_end(command, file, 1)
    if status:
        printed = log.read_text(encoding="utf-8", errors="replace")
        raise UserError(f"tools/{name}.py: {what_failed(printed, status)}")
