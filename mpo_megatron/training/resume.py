"""Where a run goes on: from its newest checkpoint that is whole, to the last bit of what was written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mpo_megatron.conversion.integrity import check_digests
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.errors import CheckpointError
from mpo_megatron.runtime.parallel import ParallelLayout, raise_together, raising_together
from mpo_megatron.training.checkpoint import all_checkpoints, load_checkpoint, remove_leftovers
from mpo_megatron.training.experiment import CHECKPOINTS
from mpo_megatron.training.job import Job
from mpo_megatron.training.report import say
from mpo_megatron.training.validation import drop_after

# Beside a checkpoint: the identity of the run that it belongs to.
IDENTITY_FILE = "run.json"


def resume(job: Job) -> int:
    """Load the newest whole checkpoint of a run that is to be resumed. Returns the steps that are done. All ranks call
    it.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or it is another run's; on all ranks.
    """
    if not job.setup.config.exp_manager.get("resume_if_exists"):
        return 0
    # Found by one rank: a network file system may not show all nodes the same yet.
    found: list[list[Path]] = [[]]
    if job.is_main:
        remove_leftovers(job.folder / CHECKPOINTS)
        found = [list(all_checkpoints(job.folder / CHECKPOINTS).values())[::-1]]
    dist.broadcast_object_list(found, src=0, group=job.setup.layout.control)
    (paths,) = found
    if not paths:
        if job.experiment is not None:
            job.experiment.rewind(-1)  # a start that came to no checkpoint is started anew
            drop_after(job.folder, -1)
        return 0
    path = _newest_whole(paths, job.setup.layout)
    with raising_together(job.setup.layout):
        if job.is_main:
            _check_same_run(path, job)
    step = load_checkpoint(path, job.chunks, job.optimizer, job.schedule, job.setup.layout)
    if job.experiment is not None:
        job.experiment.rewind(step)
        drop_after(job.folder, step)
        say(f"resumed at step {step} from {path}")
    return step


def _newest_whole(paths: Sequence[Path], layout: ParallelLayout) -> Path:
    """The first of them that is whole. Those before it are given other names, so that nothing takes them for newer."""
    damaged: list[CheckpointError] = []
    for path in paths:
        error = _damage(path, layout)
        if error is None:
            break
        damaged.append(error)
    else:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {paths[0].parent} is whole (of the newest: {damaged[0]}); bring "
            "them back from a copy, or start anew in another folder"
        )
    if layout.is_main:
        for other, error in zip(paths, damaged, strict=False):
            say(f"warning: {error}; the checkpoint is damaged and now called {_set_aside(other)}")
        if damaged:
            say(f"warning: the run goes on from the newest whole checkpoint, {path}")
    return path


def _damage(path: Path, layout: ParallelLayout) -> CheckpointError | None:
    """What is wrong with a checkpoint, the same on all ranks; each checks its share of the tensors."""
    error = None
    try:
        if layout.is_main:
            check_digests(path)
        CheckpointReader(path).check(layout.rank, layout.world_size)
    except CheckpointError as caught:
        error = caught
    try:
        raise_together(error, layout)
    except CheckpointError as caught:
        return caught
    return None


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint. Returns its new name."""
    number, name = 1, f"damaged_{path.name}"
    while path.with_name(name).exists():
        number += 1
        name = f"damaged_{path.name}_{number}"
    path.rename(path.with_name(name))
    return name


def identity(job: Job) -> dict[str, Any]:
    """What the position of a run, its count of steps, refers to."""
    config = job.setup.config
    return {
        "model.data.train": job.setup.train.dataset.fingerprint,
        "model.global_batch_size": config.model.global_batch_size,
        "trainer.seed": config.trainer.seed,
    }


def _check_same_run(path: Path, job: Job) -> None:
    saved = json.loads((path / IDENTITY_FILE).read_text(encoding="utf-8"))
    for key, value in identity(job).items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{path} was saved with another {key} ({saved.get(key)}, now {value}), so its steps are not this "
                "run's; set it back, or start anew in another folder"
            )
