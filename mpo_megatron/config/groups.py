"""YAMLs, and groups of settings: folders of YAMLs of which a defaults list takes one file each.

A command chooses another file of a group (`gpu=h100`). What cannot be composed is one sentence, said before Hydra says
it in several.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mpo_megatron.config.parse import check_keys, check_numbers, check_overrides, parse, register_schema
from mpo_megatron.config.schema import Config
from mpo_megatron.errors import ConfigError
from mpo_megatron.overrides import read_yaml

# Presets, and the groups that they take.
CONF = Path(__file__).resolve().parents[2] / "conf"
_CHOICE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Yaml:
    """A YAML and the folders in which what it takes is looked for: of two files of one name the first folder's counts.

    Attributes:
        path: the YAML, in one of the folders.
        folders: Hydra's search path.
    """

    path: Path
    folders: tuple[Path, ...]

    @classmethod
    def at(cls, path: Path) -> "Yaml":
        """A YAML anywhere, which takes what lies beside it, and of conf/ the rest."""
        folder = path.absolute().parent
        return cls(path, tuple(dict.fromkeys((folder, CONF))))

    @classmethod
    def named(cls, name: str, folders: Sequence[Path]) -> "Yaml":
        """The first of this name.

        Raises:
            ConfigError: no folder has one, or the name has a folder.
        """
        if "/" in name:
            raise ConfigError(f"--config-name {name} has a folder in it; give the folder as --config-dir")
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError(f"there is no folder {folder} to take YAMLs from")
        file = f"{name.removesuffix('.yaml')}.yaml"
        for folder in folders:
            if (folder / file).is_file():
                return cls(folder / file, tuple(folders))
        there = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        raise ConfigError(
            f"there is no {file} in {' or '.join(map(str, folders))}; the YAMLs there are "
            f"{', '.join(there) or 'none'}"
        )

    def base(self, name: str) -> Path | None:
        """The file that the defaults list of a YAML means by a name; None where only Hydra knows it.

        Raises:
            ConfigError: there is none.
        """
        for folder in self.folders:
            beside = folder / f"{name.removeprefix('/')}.yaml"
            try:
                if beside.is_file():
                    return beside
                beside.lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{self.path}: defaults has {name!r}, which no file can be called"
                ) from error
        if name == "_self_" or f"{name}.yaml" in ConfigStore.instance().repo:
            return None
        raise ConfigError(
            f"{self.path}: defaults has {name!r}, and there is no {name}.yaml in "
            f"{' or '.join(map(str, self.folders))}"
        )

    def known(self) -> set[str]:
        """The groups that there are."""
        return {path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()}

    def files(self, group: str) -> list[str]:
        """What a group can be, as a command names it."""
        folders = [folder / group for folder in self.folders]
        return sorted(
            {
                path.relative_to(folder).with_suffix("").as_posix()
                for folder in folders
                for path in folder.rglob("*.yaml")
            }
        )

    def file(self, group: str, name: str) -> Path:
        """The file of one of `files`."""
        return next(path for folder in self.folders if (path := folder / group / f"{name}.yaml").is_file())


def groups(yaml: Yaml) -> dict[str, str]:
    """The groups of the defaults lists of a YAML and of its bases, with what it takes of each, which may name other
    choices (`${gpu}`).

    Raises:
        ConfigError: there is no such YAML, or it is not as it must be.
    """
    register_schema()
    return _groups(yaml, yaml.path, ())


def _groups(yaml: Yaml, path: Path, above: tuple[Path, ...]) -> dict[str, str]:
    if path in above:
        raise ConfigError(f"{path}: its defaults take {above[-1]}, whose defaults take it")
    content = _mapping(path)
    defaults = content.pop("defaults", [])
    content.pop("hydra", None)
    try:
        check_keys(content, Config, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(defaults, list) or not all(item and isinstance(item, str | dict) for item in defaults):
        raise ConfigError(
            f"{path}: defaults must be a list of names and of groups with what to take, such as [schema, gpu: h100, "
            f"_self_], not {defaults}"
        )
    bases = [Yaml(path, yaml.folders).base(item) for item in defaults if isinstance(item, str)]
    found: dict[str, str] = {}
    for base in bases:
        if base is not None:
            found |= _groups(yaml, base, (*above, path))
    for item in defaults:
        for group, choice in item.items() if isinstance(item, dict) else ():
            if not isinstance(choice, str | int):
                raise ConfigError(
                    f"{path}: defaults has {group}: {choice}; give the name of one of its files"
                )
            # "override gpu" chooses anew of a base's group; Hydra's own groups are no settings.
            name = str(group).removeprefix("override ").removeprefix("/")
            if not name.startswith("hydra/"):
                found[name] = str(choice)
    return found


def _mapping(path: Path) -> dict[Any, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys with their values, not {content}")
    check_numbers(content, f"{path}: ")
    return content


def check_command(yaml: Yaml, overrides: Sequence[str]) -> None:
    """Check a command's overrides of a YAML: keys, groups, and that each group's file is there.

    Raises:
        ConfigError: an unknown key, a group that the YAML does not have, a choice or a combination that there is not.
    """
    taken = groups(yaml)
    known = yaml.known()
    for override in check_overrides(overrides, known):
        group = override.key_or_group
        if override.is_delete():
            taken.pop(group, None)
        elif group in taken:
            taken[group] = str(override.value())
        elif group in known:
            choices = ", ".join(taken) or "none"
            raise ConfigError(
                f"{group}={override.value()} chooses from a group of settings that {yaml.path.name} does not take "
                f"(it takes {choices}); remove it, or give --config-name another YAML"
            )
    for group, choice in taken.items():
        _check_choice(yaml, group, choice, taken)


def _check_choice(yaml: Yaml, group: str, choice: str, taken: dict[str, str]) -> None:
    """Raise ConfigError unless the group has the file that is chosen."""
    name = _CHOICE.sub(lambda found: taken.get(found[1], found[0]), choice)
    there = yaml.files(group)
    if name in there:
        _mapping(yaml.file(group, name))
        return
    if not there:
        raise ConfigError(
            f"{' or '.join(map(str, yaml.folders))} has no group of settings {group}; remove {group}={name}"
        )
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
    raise ConfigError(f"{yaml.path.stem} has no {group} for {asked}; choose {sets}")


def compose_yaml(yaml: Yaml, overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes of a YAML and overrides: with the schema where the YAML takes it, and not checked.

    Raises:
        ConfigError: it cannot be composed.
    """
    check_command(yaml, overrides)
    first, *others = yaml.folders
    places = ", ".join(_quoted(f"file://{folder}") for folder in others)
    try:
        with initialize_config_dir(str(first), version_base=None), warnings.catch_warnings():
            # Of a defaults list without _self_, which counts as its last item then.
            warnings.simplefilter("ignore", UserWarning)
            return compose(yaml.path.stem, [f"hydra.searchpath=[{places}]", *overrides])
    except (HydraException, OmegaConfBaseException, OSError) as error:
        said = " ".join(str(error).split())
        if isinstance(error.__cause__, OmegaConfBaseException) and str(error.__cause__) != str(error):
            # Hydra names the override, and OmegaConf what is wrong with it.
            said += f": {str(error.__cause__).splitlines()[0]}"
        raise ConfigError(f"{yaml.path}: {said}") from error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'"


def compose_config(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration that the main job has of a YAML and overrides.

    Args:
        path: a YAML anywhere; see `Yaml.at`.

    Raises:
        ConfigError: as the main job has it.
    """
    yaml = Yaml.at(path)
    if not path.is_file():
        Yaml.named(path.name, yaml.folders[:1])
    return parse(compose_yaml(yaml, overrides))
