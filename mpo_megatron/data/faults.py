"""Records that cannot be trained on: the run stops at one, or leaves it out, counts it and notes why."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import TextIO

from mpo_megatron.config import FaultConfig
from mpo_megatron.data.schema import RecordError, ScoredGroup, brief

# Raises what it is told of, or says whether the record is left out.
OnFault = Callable[[RecordError], bool]

LONG_PROMPT = "long_prompt"
# The keys of the configuration, and what `model.data.truncation` decides on.
FAULTS = (*(field.name for field in fields(FaultConfig)), LONG_PROMPT)


def stop(error: RecordError) -> bool:
    """The `OnFault` that raises every fault. A long prompt is told of only where it is to be left out, and is."""
    if error.fault != LONG_PROMPT:
        raise error
    return True


class Faults:
    """The `OnFault` of a configuration.

    Args:
        policy: what becomes of each fault.
        report: where a line of JSON goes for every record that is left out: its place, its fault and why.

    Attributes:
        left_out: by fault, records that were.
    """

    def __init__(self, policy: FaultConfig, report: TextIO | None = None) -> None:
        self._policy = policy
        self._report = report
        self.left_out: Counter[str] = Counter()

    def __call__(self, error: RecordError) -> bool:
        """Whether the record is left out.

        Raises:
            RecordError: the fault ends the run; with what would have it go on.
        """
        # As in `stop`.
        policy = "skip" if error.fault == LONG_PROMPT else getattr(self._policy, error.fault)
        if policy == "error":
            problem = f"{error.problem}; or leave such groups out: model.data.faults.{error.fault}=skip"
            raise RecordError(error.where, problem, error.fault)
        if policy == "skip":
            self.left_out[error.fault] += 1
            if self._report is not None:
                line = {"where": error.where, "fault": error.fault, "why": error.problem}
                self._report.write(json.dumps(line, ensure_ascii=False) + "\n")
        return bool(policy == "skip")


def repeats(group: ScoredGroup, seen: Mapping[str, str]) -> Iterator[RecordError]:
    """What a group has twice, or has that an earlier one had.

    Args:
        seen: the places of earlier groups by their ids.
    """
    if group.id in seen:
        problem = (
            f"the id {brief(group.id)} is that of {seen[group.id]} too; give every record its own, or none"
        )
        yield RecordError(group.where, problem, "duplicate_id")
    firsts: dict[str, int] = {}
    equal: RecordError | None = None
    for number, response in enumerate(group.responses):
        first = firsts.setdefault(response.text.strip(), number)
        if first == number:
            continue
        found = f"responses {first + 1} and {number + 1} of {len(group.responses)} are equal"
        scores = group.responses[first].score, response.score
        if scores[0] != scores[1]:
            problem = f"{found} and have scores {scores[0]:g} and {scores[1]:g}; remove one of them"
            yield RecordError(group.where, problem, "unequal_scores")
            return
        equal = equal or RecordError(group.where, f"{found}; remove one of them", "equal_responses")
    if equal is not None:
        yield equal
