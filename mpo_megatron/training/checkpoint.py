"""Megatron distributed checkpoints: saved at any layout, loaded at any other.

A checkpoint is a folder `checkpoints/step_NNNNNNN` in the experiment folder. It is written under a temporary name and
renamed when complete, so that a folder with a final name is always whole. Nothing in a training step draws random
numbers (no dropout; the data order is a function of seed and epoch), so the step count is the whole position
in the run.
"""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mpo_megatron.conversion.hf_folder import HF_FOLDER, copy_all_but_weights
from mpo_megatron.conversion.restore import fill_model, load_state
from mpo_megatron.model.provider import unwrap
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.runtime.publish import replace
from mpo_megatron.training.optimizer import load_optimizer

# The optimizer's state in the parameters' own shapes: Megatron's form that can be loaded at any other layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_PREFIX = "step_"


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, if there is one."""
    found = [
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()
    ]
    return max(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)


def save_checkpoint(
    folder: Path,
    step: int,
    chunks: list[Any],
    optimizer: Any,
    schedule: OptimizerParamScheduler,
    layout: ParallelLayout,
    files: dict[str, str],
    hf_source: Path,
) -> Path:
    """Write the state after optimizer step `step`; all ranks call it.

    Args:
        folder: the run's checkpoints folder, on storage that all ranks share.
        files: names and texts of small files to put into the checkpoint, such as the resolved configuration.
        hf_source: the Hugging Face folder of the start, whose config and tokenizer go into the checkpoint's
        `hf` folder.
    """
    final = folder / f"{_PREFIX}{step:07d}"
    temporary = folder / f".{final.name}.tmp"
    if layout.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(group=layout.control)
    dist_checkpointing.save(_state(chunks, optimizer, schedule, step, is_loading=False), str(temporary))
    if layout.is_main:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / HF_FOLDER).mkdir()
        copy_all_but_weights(hf_source, temporary / HF_FOLDER, next(chunks[0].parameters()).dtype)
        replace(temporary, final)
    dist.barrier(group=layout.control)
    return final


def load_checkpoint(
    path: Path, chunks: list[Any], optimizer: Any, schedule: OptimizerParamScheduler, layout: ParallelLayout
) -> int:
    """Fill model, optimizer and schedule from a checkpoint of any layout. Returns the optimizer steps that it had done.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, is of another model, or has delayed FP8 scales that
            may not be read; on all ranks.
    """
    loaded = load_state(_state(chunks, optimizer, schedule, 0, is_loading=True), path, layout)
    for i, chunk in enumerate(chunks):
        fill_model(unwrap(chunk), loaded[f"model{i}"], path)
    load_optimizer(optimizer, loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    return int(loaded["step"])


def _state(
    chunks: list[Any], optimizer: Any, schedule: OptimizerParamScheduler, step: int, *, is_loading: bool
) -> dict[str, Any]:
    models = {f"model{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}
    return {
        **models,
        "optimizer": optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=_METADATA),
        "schedule": schedule.state_dict(),
        "step": step,
    }
