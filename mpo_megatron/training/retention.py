"""Which of a run's checkpoints are kept: the newest, and the best by a metric of validation."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from mpo_megatron.config import MONITORS, CheckpointConfig
from mpo_megatron.conversion.torch_dist import FORMAT_FILE
from mpo_megatron.runtime.publish import is_being_read
from mpo_megatron.training.report import say

# In a checkpoint: the metrics of the validation of its step, if there was one.
VALIDATION_FILE = "validation.json"
_REMOVED = ".removed"


def superfluous(
    values: Mapping[int, float | None], rule: CheckpointConfig, needed: Collection[int] = ()
) -> list[int]:
    """The steps whose checkpoints may go, the oldest first.

    Args:
        values: of the monitored metric after each step that has a checkpoint; None (or NaN): unknown, worse than any.
        rule: how many are kept.
        needed: steps whose checkpoints are in use.
    """
    steps = sorted(values, reverse=True)
    if not rule.removes_some:
        return []
    kept = {*steps[: max(rule.most_recent_k, 1)], *needed}
    if rule.save_top_k != -1:
        sign = -1 if (rule.mode or MONITORS[rule.monitor]) == "max" else 1
        ranked = {
            step: sign * value for step, value in values.items() if value is not None and value == value
        }
        # Of equal ones the newer.
        kept |= set(sorted(ranked, key=lambda step: (ranked[step], -step))[: rule.save_top_k])
    return sorted(set(steps) - kept)


def remove_superfluous(
    checkpoints: Mapping[int, Path], rule: CheckpointConfig, in_use: Collection[Path]
) -> None:
    """Remove a run's checkpoints that the rule does not keep, and say so; for one rank.

    Each loses its name before its files, so that none of that name is ever incomplete.

    Args:
        checkpoints: the run's, by step.
        in_use: folders that must stay.
    """
    if not rule.removes_some:
        return
    busy = {path.resolve() for path in in_use}
    values = {step: monitored(path, rule.monitor) for step, path in checkpoints.items()}
    # An export may have outlived the start of the run that began it.
    needed = [
        step
        for step, path in checkpoints.items()
        if path.resolve() in busy or is_being_read(path / FORMAT_FILE)
    ]
    for step in superfluous(values, rule, needed):
        path = checkpoints[step]
        nameless = path.with_name(f".{path.name}{_REMOVED}")
        try:
            path.rename(nameless)
            shutil.rmtree(nameless)
        except OSError as error:
            say(f"warning: {path} could not be removed ({error.strerror or error})")
            continue
        say(f"removed     {path}")


def monitored(checkpoint: Path, monitor: str) -> float | None:
    """The metric in the validation that was made at a checkpoint, if there was one."""
    path = checkpoint / VALIDATION_FILE
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8")).get(monitor)
    return None if value is None else float(value)
