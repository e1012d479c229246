"""The validation split's metrics, and on request the log-prob and reward of each of its responses in a file."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mpo_megatron.errors import UserError
from mpo_megatron.runtime.parallel import raising_together
from mpo_megatron.training.job import Job
from mpo_megatron.training.report import progress
from mpo_megatron.training.setup import Split
from mpo_megatron.training.step import objective_pass

# In the run's folder: a file for each validation, by its step.
FOLDER = "validation"


def validate(job: Job, step: int) -> dict[str, float]:
    """Log the validation split's metrics after `step` optimizer steps. Returns them; nothing without such a split.

    Every rank calls it.

    Raises:
        UserError: with `trainer.log_val_groups`, the file of responses cannot be written; on all ranks.
    """
    split, layout = job.setup.validation, job.setup.layout
    if split is None:
        return {}
    references = job.references["validation"]
    responses = None
    if job.setup.config.trainer.log_val_groups:
        responses = torch.zeros(2, len(references), dtype=torch.float64, device=layout.device)
    for chunk in job.chunks:
        chunk.eval()
    sums: dict[str, float] = {}
    groups = 0
    bar = progress("validation", "step", layout.is_main)
    with split.source.steps(split.steps) as steps:
        for _, rows in zip(bar(split.steps), steps, strict=True):
            values = objective_pass(
                job.chunks, rows, job.setup.objective, references, layout,
                forward_only=True, responses=responses,
            )  # fmt: skip
            sums = {name: sums.get(name, 0.0) + value * rows.groups for name, value in values.items()}
            groups += rows.groups
    means = {name: value / groups for name, value in sums.items()}
    job.log(step, "validation", means)
    if responses is not None:
        dist.all_reduce(responses)  # each response is on one rank and 0 on the others: the sum is exact
        with raising_together(layout):
            if job.is_main:
                write_groups(path_of(job.folder, step), split, responses)
    return means


def path_of(folder: Path, step: int) -> Path:
    """Where the responses of the validation after `step` are written, in the run's folder."""
    return folder / FOLDER / f"step_{step:07d}.jsonl"


def drop_after(folder: Path, step: int) -> None:
    """Remove what validations after `step` have written: a run that goes on there may end before they come again."""
    for path in (folder / FOLDER).glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()


def write_groups(path: Path, split: Split, responses: Tensor) -> None:
    """A line of JSON for each group of the split's steps, whole or not at all.

    Each has the group's `id`, and of its responses, in the data's order, `logps` (sums over tokens), `rewards`
    (implicit, in the objective's own units), `tokens`, `scores` and whether they are `preferred`.

    Args:
        responses: [2, responses of the data set] log-probs and rewards.
    """
    dataset = split.dataset
    logps, rewards = responses.cpu().numpy()
    lines = []
    for position in (int(i) for step in split.steps for i in step):
        group = dataset.group(position)
        own = slice(*dataset.response_offsets[position : position + 2])
        line = {
            "id": group.id,
            "logps": logps[own].tolist(),
            "rewards": rewards[own].tolist(),
            "tokens": dataset.response_lengths[own].tolist(),
            "scores": group.scores.tolist(),
            "preferred": group.preferred.tolist(),
        }
        lines.append(json.dumps(line) + "\n")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); make room, or set trainer.log_val_groups=false"
        ) from error
