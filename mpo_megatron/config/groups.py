"""Groups of settings: the folders of conf/ of which a YAML's defaults list takes one file each.

A command chooses another file of a group (`gpu=h100`). `compose_config` composes and parses; what cannot be composed is
one sentence, said before Hydra sees it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mpo_megatron.config.parse import check_overrides, parse, register_schema
from mpo_megatron.config.schema import Config
from mpo_megatron.errors import ConfigError
from mpo_megatron.overrides import read_yaml

_CHOICE = re.compile(r"\$\{(\w+)\}")


def groups(yaml: Path) -> dict[str, str]:
    """The groups of a YAML's defaults list with what it takes of each, which may name other choices (`${gpu}`).

    Raises:
        ConfigError: there is no such YAML, or it is not as it must be.
    """
    if not yaml.is_file():
        near = ", ".join(sorted(path.stem for path in yaml.parent.glob("*.yaml")))
        raise ConfigError(f"there is no {yaml.name} in {yaml.parent}; its YAMLs are {near or 'none'}")
    defaults = _mapping(yaml).get("defaults", [])
    if not isinstance(defaults, list) or not all(item and isinstance(item, str | dict) for item in defaults):
        raise ConfigError(
            f"{yaml}: defaults must be a list of names and of groups with what to take, such as [schema, gpu: h100, "
            f"_self_], not {defaults}"
        )
    found: dict[str, str] = {}
    for base in (item for item in defaults if isinstance(item, str)):
        beside = yaml.parent / f"{base}.yaml"
        try:
            beside.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue  # Hydra looks in other places, too
        except (OSError, ValueError) as error:
            raise ConfigError(f"{yaml}: defaults has {base!r}, which no file can be called") from error
        _mapping(beside)
    for item in defaults:
        for group, choice in item.items() if isinstance(item, dict) else ():
            if not isinstance(choice, str | int):
                raise ConfigError(
                    f"{yaml}: defaults has {group}: {choice}; give the name of one of its files"
                )
            found[str(group)] = str(choice)
    return found


def _mapping(yaml: Path) -> dict[Any, Any]:
    content = read_yaml(yaml)
    if not isinstance(content, dict):
        raise ConfigError(f"{yaml} must hold keys with their values, not {content}")
    return content


def files(yaml: Path, group: str) -> list[str]:
    """What a group of this YAML can be, as a command names it."""
    folder = yaml.parent / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def check_command(yaml: Path, arguments: Sequence[str]) -> None:
    """Check a command's overrides of a YAML: keys, groups, and that each group's file is there.

    Raises:
        ConfigError: an unknown key, a group that the YAML does not have, a choice or a combination that there is not.
    """
    taken = groups(yaml)
    known = {path.name for path in yaml.parent.iterdir() if path.is_dir()}
    check_overrides(arguments, known)
    overrides = [
        argument
        for argument in arguments
        if argument.startswith("~") or ("=" in argument and not argument.startswith("-"))
    ]
    for override in OverridesParser.create().parse_overrides(overrides):
        group = override.key_or_group
        if override.is_delete():
            taken.pop(group, None)
        elif group in taken:
            taken[group] = str(override.value())
        elif group in known:
            choices = ", ".join(taken) or "none"
            raise ConfigError(
                f"{group}={override.value()} chooses from a group of settings that {yaml.name} does not take "
                f"(it takes {choices}); remove it, or give --config-name another YAML"
            )
    for group, choice in taken.items():
        _check_choice(yaml, group, choice, taken)


def _check_choice(yaml: Path, group: str, choice: str, taken: dict[str, str]) -> None:
    """Raise ConfigError unless the group has the file that is chosen."""
    name = _CHOICE.sub(lambda found: taken.get(found[1], found[0]), choice)
    there = files(yaml, group)
    if name in there:
        _mapping(yaml.parent / group / f"{name}.yaml")
        return
    if not there:
        raise ConfigError(f"{yaml.parent} has no group of settings {group}; remove {group}={name}")
    if name == choice:
        raise ConfigError(f"{group}={name} is not known; choose one of {', '.join(there)}")
    # The same pattern with every choice.
    named = _CHOICE.findall(choice)
    pattern = re.compile("([^/]+)".join(re.escape(part) for part in _CHOICE.split(choice)[::2]))
    fitting = [found.groups() for found in map(pattern.fullmatch, there) if found]
    sets = " or ".join(
        " ".join(f"{key}={value}" for key, value in zip(named, values, strict=True)) for values in fitting
    )
    asked = " ".join(f"{key}={taken[key]}" for key in named)
    raise ConfigError(f"{yaml.stem} has no {group} for {asked}; choose {sets}")


def compose_config(yaml: Path, overrides: Sequence[str]) -> Config:
    """The configuration that the main job has of a YAML and overrides.

    Raises:
        ConfigError: as the main job has it.
    """
    check_command(yaml, overrides)
    register_schema()
    try:
        with initialize_config_dir(str(yaml.resolve().parent), version_base=None):
            return parse(compose(yaml.stem, list(overrides)))
    except (HydraException, OmegaConfBaseException, OverflowError, OSError) as error:
        raise ConfigError(f"{yaml}: {' '.join(str(error).split())}") from error
