"""Overrides of the main job, out of a mapping or a list of a comparison file."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mpo_megatron.errors import UserError

SECTIONS = ("trainer", "model", "exp_manager", "name")
MPO = "model.mpo."
# What the comparison itself sets, by key, and where it is said instead.
OWN = {
    "trainer.seed": "`seeds` of the comparison file",
    "exp_manager.explicit_log_dir": "--output",
    "exp_manager.resume_if_exists": "the comparison, whose runs go on from their newest checkpoint",
}


def as_typed(section: Any, where: str, prefix: str = "") -> list[str]:
    """Overrides as a list, or as a mapping, where `prefix` goes before keys outside of the job's sections.

    Raises:
        UserError: it is neither, or `checked` raises it.
    """
    if isinstance(section, list):
        return checked(section, where)
    if not isinstance(section, dict):
        raise UserError(
            f"{where} must be a mapping such as {{objective: dpo, beta: 0.1}} or a list of overrides such as "
            f"[model.mpo.beta=0.1], not {section}"
        )
    paths = {full_key(key, prefix): value for key, value in section.items()}
    return checked([override for path, value in paths.items() for override in _flat(path, value)], where)


def full_key(key: Any, prefix: str = "") -> str:
    """The job's key: outside of its sections with `prefix`."""
    return str(key) if str(key).split(".")[0] in SECTIONS else f"{prefix}{key}"


def _flat(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(f"{path}.{key}", below)
    else:
        yield f"{path}={as_value(value)}"


def as_value(value: Any) -> str:
    """A value as an override gives it: as JSON, without the quotes where Hydra needs none."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./~@+-]+", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def checked(overrides: Sequence[Any], where: str) -> list[str]:
    """The overrides, each of which is of the form key=value and of no key that is the comparison's own.

    Raises:
        UserError: one is not.
    """
    for override in overrides:
        key, equals, _ = str(override).partition("=")
        if not isinstance(override, str) or not equals or not key:
            raise UserError(
                f"{where}: {override} is no override; write key=value, such as model.optim.lr=1e-5"
            )
        if key.lstrip("+") in OWN:
            raise UserError(f"{where}: {key} is set by {OWN[key.lstrip('+')]}; remove it")
    return list(overrides)
