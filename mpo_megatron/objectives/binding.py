"""From a name and the keys of the configuration to an objective with its hyper-parameters bound."""

import difflib
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from mpo_megatron.errors import ConfigError
from mpo_megatron.objectives.pointwise import sft
from mpo_megatron.objectives.registry import Entry, GroupBatch, Objective, ObjectiveResult, get, names


def settle(entry: Entry, given: Mapping[str, Any], other_keys: Collection[str] = ()) -> dict[str, Any]:
    """All hyper-parameters of an objective: those given, and the defaults of the others.

    Args:
        given: values by name, None for one that is not given after all.
        other_keys: what else stands beside them under `model.mpo`, for the hint at a typing error.

    Raises:
        ConfigError: a key that no objective has, that this one does not use, or that it needs and lacks; a wrong value.
    """
    given = {name: value for name, value in given.items() if value is not None}
    takes = entry.hyper_parameters
    anywhere = {*other_keys, *(parameter for name in names() for parameter in get(name).hyper_parameters)}
    for name in given:
        if name not in anywhere:
            near = difflib.get_close_matches(name, anywhere, n=1)
            hint = f"did you mean model.mpo.{near[0]}?" if near else f"{entry.name} takes {_listed(takes)}"
            raise ConfigError(f"unknown key model.mpo.{name}; {hint}")
    unused = [name for name in given if name not in takes]
    missing = [name for name, parameter in takes.items() if parameter.required and name not in given]
    if unused or missing:
        raise ConfigError(_mismatch(entry, given, unused, missing))
    return {
        name: parameter.check(given[name]) if name in given else parameter.default
        for name, parameter in takes.items()
    }


def _mismatch(entry: Entry, given: Mapping[str, Any], unused: list[str], missing: list[str]) -> str:
    """The sentence that says how to make the keys those that the objective takes."""
    said = []
    if unused:
        said.append("does not use " + " and ".join(f"model.mpo.{name}={given[name]}" for name in unused))
    if missing:
        said.append("needs " + " and ".join(f"model.mpo.{name}" for name in missing))
    mended = [f"model.mpo.{name}=null" for name in unused] + [f"model.mpo.{name}=..." for name in missing]
    return (
        f"the objective {entry.name} {' and '.join(said)}: it takes {_listed(entry.hyper_parameters)} "
        f"(as its authors: {entry.settings}); add {' '.join(mended)} to the command, or change the YAML"
    )


def _listed(names_of: Collection[str]) -> str:
    return ", ".join(names_of) or "no hyper-parameters"


def bind(entry: Entry, hyper_parameters: Mapping[str, Any], sft_weight: float = 0.0) -> Objective:
    """The objective with these hyper-parameters, plus `sft_weight` times the loss of `sft` on the best response.

    Such a term holds the likelihood of the best response up, which contrasts alone may let fall (Pang et al. 2024,
    Iterative Reasoning Preference Optimization, Eq. 1, with a weight of 1).
    """
    objective = partial(entry, **hyper_parameters)
    if not sft_weight:
        return objective

    def with_sft(batch: GroupBatch) -> ObjectiveResult:
        result = objective(batch)
        return ObjectiveResult(result.losses + sft_weight * sft(batch).losses, result.rewards)

    return with_sft
