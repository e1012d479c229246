"""Megatron distributed checkpoints of a run, saved at any layout: where they are, and loading them at any other.

A checkpoint is a folder `checkpoints/step_NNNNNNN` in the experiment folder. It is written under a temporary name and
renamed when complete, so that a folder with a final name is always whole. Nothing in a training step draws random
numbers (no dropout; the data order is a function of seed and epoch), so the step count is the whole position
in the run.
"""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mpo_megatron.conversion.buckets import Piece, read_pieces
from mpo_megatron.conversion.restore import fill_model, load_state, read_content
from mpo_megatron.model.provider import unwrap
from mpo_megatron.runtime.parallel import ParallelLayout, raising_together
from mpo_megatron.training.optimizer import load_optimizer
from mpo_megatron.training.optimizer_state import (
    BUCKETS,
    FORM,
    WHOLE,
    call_whole,
    check_kind,
    pieces,
    read_buckets_in_shape,
    sharded_state,
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
        held = read_pieces(path)
    models = sharded_models(chunks)
    form = (saved or {}).get(FORM, WHOLE)
    reshaped = form == BUCKETS and not _same_buckets(held, optimizer, models, layout)
    state = sharded_state(optimizer, models, WHOLE if reshaped else form, is_loading=True)
    if reshaped:
        read_buckets_in_shape(state, layout.rank)
    loaded = load_state({**models, "optimizer": state}, path, layout)
    for i, chunk in enumerate(chunks):
        fill_model(unwrap(chunk), loaded[f"model{i}"], path)
    if reshaped:
        call_whole(loaded["optimizer"])
    load_optimizer(optimizer, loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    return int(loaded["step"])


def _same_buckets(held: list[Piece], optimizer: Any, models: dict[str, Any], layout: ParallelLayout) -> bool:
    """Whether all ranks have each parameter at the place where the checkpoint has it; all call it."""
    own = pieces(optimizer, models, sharded_state(optimizer, models, BUCKETS, is_loading=True))
    answers: list[bool] = [False] * layout.world_size
    dist.all_gather_object(answers, set(own) <= set(held), group=layout.control)
    return all(answers)


def sharded_models(chunks: list[Any]) -> dict[str, Any]:
    """The sharded state dictionaries of a rank's model chunks, under their names in checkpoints."""
    return {f"model{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}
