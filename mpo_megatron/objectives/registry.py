"""What an objective is given, what it returns, and the table of all of them.

An objective is a function `objective(batch, *, hyper-parameters) -> ObjectiveResult` of whole groups. Its keyword-only
parameters are its hyper-parameters: names, types, ranges (`hyper`) and defaults stand in the signature alone. It leaves
everything on the device: what makes the host wait, such as `.item()` or an index by a mask, stops the whole step; see
`mpo_megatron.ragged`.

Shapes: R responses, G groups, in the row's order. All values are float32 (or float64 in tests) on one device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from mpo_megatron.errors import ConfigError
from mpo_megatron.objectives.hyper import HyperParameter, hyper_parameters
from mpo_megatron.ragged.groups import GroupIndex
from mpo_megatron.ragged.segments import Segments


@dataclass(frozen=True)
class GroupBatch:
    """The responses of some whole groups; of all groups of the global step for an objective that needs them.

    Attributes:
        policy_logps: [R] sum of log pi(y | x) over the response's tokens; carries the gradient.
        reference_logps: [R] the same under the reference policy; NaN where there is none.
        lengths: [R] response tokens.
        scores: [R] the responses' scores, of the type of the log-probs.
        preferred: [R] bool, the partition.
        response_ids: [R] int64, the responses' numbers in the data set.
        index: which of them are in which group: `GroupIndex.of` the groups' sizes.
    """

    policy_logps: Tensor
    reference_logps: Tensor
    lengths: Tensor
    scores: Tensor
    preferred: Tensor
    response_ids: Tensor
    index: GroupIndex

    @property
    def groups(self) -> Segments:
        """The responses in their groups, for the arithmetic of `mpo_megatron.ragged`."""
        return self.index.groups

    @property
    def num_groups(self) -> int:
        """G."""
        return self.groups.count

    @property
    def log_ratios(self) -> Tensor:
        """[R] r = log pi(y | x) - log pi_ref(y | x)."""
        return self.policy_logps - self.reference_logps

    @property
    def mean_logps(self) -> Tensor:
        """[R] log pi(y | x) / |y|."""
        return self.policy_logps / self.lengths


@dataclass(frozen=True)
class ObjectiveResult:
    """What an objective returns.

    Attributes:
        losses: [G] one loss a group; the caller takes the mean over the global batch.
        rewards: [R] detached implicit rewards of the responses, in the loss's own units (beta * r for MPO).
    """

    losses: Tensor
    rewards: Tensor


# An objective with its hyper-parameters bound.
Objective = Callable[[GroupBatch], ObjectiveResult]


@dataclass(frozen=True)
class Entry:
    """One line of the table of objectives; calling it calls the function.

    Attributes:
        name: as in `model.mpo.objective`.
        function: the objective.
        contrasts: what it sets against what, in a few words.
        source: where it was published.
        settings: hyper-parameters that its authors used.
        needs_reference: whether it reads `reference_logps`.
        needs_partition: whether a group without a preferred response says nothing to it, and is skipped. Otherwise it
            takes the scores alone, and such a group counts.
        needs_global_batch: whether it has to see all groups of the global step at once. Its rows then run twice.
        fixed: keyword arguments that the name stands for, such as the pairs of `dpo_all_pairs`.
    """

    name: str
    function: Callable[..., ObjectiveResult]
    contrasts: str
    source: str
    settings: str
    needs_reference: bool = True
    needs_partition: bool = True
    needs_global_batch: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, batch: GroupBatch, /, **hyper_parameters: Any) -> ObjectiveResult:
        return self.function(batch, **self.fixed, **hyper_parameters)

    @cached_property
    def hyper_parameters(self) -> dict[str, HyperParameter]:
        """What the function takes beside the batch, by name; `fixed` left out."""
        found = hyper_parameters(self.function)
        return {name: found[name] for name in found if name not in self.fixed}


_ENTRIES: dict[str, Entry] = {}
Function = TypeVar("Function", bound=Callable[..., ObjectiveResult])


def register(name: str, **description: Any) -> Callable[[Function], Function]:
    """Enter the decorated function under `name`; `description` holds the other attributes of `Entry`."""

    def enter(function: Function) -> Function:
        assert name not in _ENTRIES, f"objective {name!r} is registered twice"
        _ENTRIES[name] = Entry(name, function, **description)
        return function

    return enter


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_ENTRIES)


def get(name: str) -> Entry:
    """The objective of that name.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    if name not in _ENTRIES:
        raise ConfigError(f"model.mpo.objective={name} is not known; choose one of {', '.join(names())}")
    return _ENTRIES[name]
