"""Overrides of the main job, as lists or as mappings in a YAML that starts it several times.

[model.mpo.beta=0.1, trainer.max_steps=9]                 # as on the command line
{trainer: {max_steps: 9}, model.mpo.beta: 0.1}            # as in the job's own YAML, or with dots
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mpo_megatron.errors import ConfigError, UserError

SECTIONS = ("trainer", "model", "exp_manager", "name")


def read_yaml(path: Path) -> Any:
    """The content of a YAML as Python has it: a mapping or a list, with interpolations as they stand there.

    Raises:
        ConfigError: it is not there, or no YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except AssertionError as error:  # OmegaConf's, of a text that holds a number
        raise ConfigError(f"{path} must hold keys with their values, such as seed: 1") from error


def as_typed(section: Any, where: str, own: Mapping[str, str], prefix: str = "") -> list[str]:
    """Overrides as a list, or as a mapping, where `prefix` goes before keys outside of the job's sections.

    Args:
        where: the section's name, for messages.
        own: see `checked`.

    Raises:
        UserError: it is neither, or as `checked` has it.
    """
    if isinstance(section, list):
        return checked(section, where, own)
    if not isinstance(section, dict):
        raise UserError(
            f"{where} must be a mapping such as {{objective: dpo, beta: 0.1}} or a list of overrides such as "
            f"[model.mpo.beta=0.1], not {section}"
        )
    paths = {full_key(key, prefix): value for key, value in section.items()}
    return checked([override for path, value in paths.items() for override in _flat(path, value)], where, own)


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


def checked(overrides: Sequence[Any], where: str, own: Mapping[str, str]) -> list[str]:
    """The overrides, each of which is of the form key=value.

    Args:
        own: keys that the caller itself sets, and where they are said instead.

    Raises:
        UserError: one is not, or its key is one of `own`.
    """
    for override in overrides:
        key, equals, _ = str(override).partition("=")
        if not isinstance(override, str) or not equals or not key:
            raise UserError(
                f"{where}: {override} is no override; write key=value, such as model.optim.lr=1e-5"
            )
        if key.lstrip("+") in own:
            raise UserError(f"{where}: {key} is set by {own[key.lstrip('+')]}; remove it")
    return list(overrides)


def what_differs(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str]:
    """The settings that two mappings do not share, as each has them, in words."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    then, wanted = (
        " ".join(f"{key}={said[key]}" if key in said else f"no {key}" for key in changed)
        for said in (before, now)
    )
    return then, wanted
