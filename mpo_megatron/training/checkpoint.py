"""Megatron distributed checkpoints of a run, saved at any layout: where they are, and loading them at any other.

A checkpoint is a folder `checkpoints/step_NNNNNNN` in the experiment folder. It is written under a temporary name and
renamed when complete, so that a folder with a final name is always whole. Nothing in a training step draws random
numbers (no dropout; the data order is a function of seed and epoch), so the step count is the whole position
in the run.
"""

import shutil
from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mpo_megatron.conversion.buckets import StateReader
from mpo_megatron.conversion.restore import fill_model, load_state, read_content
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.runtime.parallel import ParallelLayout, raising_together
from mpo_megatron.training.data_parallel import current_models
from mpo_megatron.training.optimizer import load_optimizer
from mpo_megatron.training.optimizer_state import (
    FORM,
    WHOLE,
    check_kind,
    is_distributed,
    read_state,
    request,
)

_PREFIX = "step_"


def folder_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step in `folder`."""
    return folder / f"{_PREFIX}{step:07d}"


def all_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in `folder` by their steps, in that order."""
    found = {path.name.removeprefix(_PREFIX): path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdigit()))


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, if there is one."""
    return next(reversed(all_checkpoints(folder).values()), None)


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was ended had begun to write or to remove; for one rank."""
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(
    path: Path, chunks: list[Any], optimizer: Any, schedule: OptimizerParamScheduler, layout: ParallelLayout
) -> int:
    """Fill model, optimizer and schedule from a checkpoint of any layout. Returns the optimizer steps that it had done.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, is of another model or kind of optimizer, or has
            delayed FP8 scales that may not be read; on all ranks.
    """
    saved = read_content(path, layout)
    with raising_together(layout):
        check_kind(path, saved, optimizer)
        state = StateReader(CheckpointReader(path))
    models = sharded_models(chunks)
    form = (saved or {}).get(FORM, WHOLE)
    loaded = load_state({**models, **request(optimizer, models, form, layout.rank)}, path, layout)
    for i, model in enumerate(current_models(chunks)):
        fill_model(model, loaded[f"model{i}"], path)
    load_optimizer(optimizer, loaded["optimizer"])
    with raising_together(layout):
        if is_distributed(optimizer):
            # Made anew: Megatron has taken the parameters out of the others.
            read_state(optimizer, sharded_models(chunks), state)
    schedule.load_state_dict(loaded["schedule"])
    return int(loaded["step"])


def sharded_models(chunks: list[Any]) -> dict[str, Any]:
    """The sharded state dictionaries of a rank's model chunks, under their names in checkpoints. All ranks call it."""
    return {f"model{i}": model.sharded_state_dict() for i, model in enumerate(current_models(chunks))}
