"""What is said and kept of steps that a run has left out, since their loss or gradient was not finite."""

from typing import Any

import numpy as np

from mpo_megatron.training.guard import NotFinite
from mpo_megatron.training.job import Job
from mpo_megatron.training.report import say

_SHOWN = 16  # ids in a message; metrics.jsonl has all


class Skips:
    """The steps that were left out in a row, up to now.

    Attributes:
        in_a_row: how many.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.in_a_row = 0
        self._last: tuple[NotFinite, list[str]] | None = None

    def end(self) -> None:
        """A step has gone well."""
        self.in_a_row = 0

    def add(self, step: int, found: NotFinite) -> None:
        """Say that a step was left out, and note the ids of all of its groups."""
        self.in_a_row += 1
        split = self._job.setup.train
        numbers = np.searchsorted(split.dataset.response_offsets, found.responses, side="right") - 1
        suspects = self._ids(np.unique(numbers))
        groups = self._ids(split.steps[step - 1])
        self._last = found, suspects or groups
        noted: dict[str, Any] = {"reason": f"the {found.what} is {found.value}", "groups": groups}
        if suspects:
            noted["of_rows_not_finite"] = suspects
        if found.parameters:
            noted["parameters"] = found.parameters
        if self._job.experiment is not None:
            self._job.experiment.note(step, "skipped", noted)
            say(f"warning: step {step} is left out: the {found.what} is {found.value}; {self._where()}")

    def message(self, first: int, last: int, way_back: str) -> str:
        """Why the run ends; `way_back` says where its state is."""
        assert self._last is not None
        found, _ = self._last
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        limit = self._job.setup.config.trainer.max_skipped_steps
        return (
            f"the {found.what} of {steps} is {found.value}, and trainer.max_skipped_steps={limit} ends the run; "
            f"{way_back}. Look at {self._where()}, or lower model.optim.lr"
        )

    def _where(self) -> str:
        assert self._last is not None
        found, ids = self._last
        shown = ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
        kind = "groups of the rows where it is" if found.responses else "its groups"
        text = f"{kind}: {shown}"
        if found.what == "gradient" and found.parameters:
            text += f"; that of {', '.join(found.parameters[:2])} among others"
        return text

    def _ids(self, groups: np.ndarray) -> list[str]:
        dataset = self._job.setup.train.dataset
        return [dataset.group(int(index)).id for index in groups]
