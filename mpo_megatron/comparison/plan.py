"""A comparison file, and the runs that it asks for. Nothing is started here.

    seeds: [1, 2, 3]
    common:                                   # of every member: keys of the main job, as in its YAML
      trainer: {max_steps: 100}
    members:
      dpo: {objective: dpo, beta: 0.1}        # keys of model.mpo
      mpo_pairs: {objective: mpo, beta: 0.1, model.data.keep_best: 1, model.data.keep_worst: 1}    # and any others
      mpo_typed: [model.mpo.objective=mpo, model.mpo.alpha=null]            # or overrides, as on the command line

A mapping that names an objective gives its hyper-parameters, too: those that conf/mpo_gpt.yaml or `common` set are of
another objective, and are taken back. A seed is `trainer.seed`: the order of the groups is the same for all members.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mpo_megatron import objectives
from mpo_megatron.config import Config, MpoConfig, check_overrides, parse, register_schema
from mpo_megatron.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("trainer", "model", "exp_manager", "name")
# Groups that say nothing to some objectives are left out for all of them, so that every step has the same groups.
DEFAULTS = ("model.data.require_preferred=true",)
# What the comparison itself sets, by key, and where it is said instead.
OWN = {
    "trainer.seed": "`seeds` of the comparison file",
    "exp_manager.explicit_log_dir": "--output",
    "exp_manager.resume_if_exists": "the comparison, whose runs go on from their newest checkpoint",
}


@dataclass(frozen=True)
class Comparison:
    """What a comparison file says: seeds, and each member's overrides of the main job, those of all included."""

    seeds: list[int]
    members: dict[str, list[str]]


@dataclass(frozen=True)
class Run:
    """One member at one seed."""

    member: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    def __str__(self) -> str:
        return f"{self.member}, seed {self.seed}"


def read_comparison(path: Path) -> Comparison:
    """Read a comparison file.

    Raises:
        UserError: it is not there, or not as it must be.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return _comparison(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _comparison(content: Any) -> Comparison:
    if not isinstance(content, dict) or not content.keys() <= {"seeds", "common", "members"}:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else "a list"
        raise UserError(f"a comparison has the keys seeds, common and members, not {keys}")
    seeds, members = content.get("seeds"), content.get("members")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"seeds must be a list of whole numbers such as [1, 2, 3], not {seeds}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={seeds} has one of them twice; remove it")
    if not isinstance(members, dict) or not members:
        raise UserError(
            "members must give a name and overrides for each run, such as `dpo: {objective: dpo, beta: 0.1}`"
        )
    common = [*DEFAULTS, *_as_typed(content.get("common") or {}, "common")]
    taken_back = [
        f"model.mpo.{name}=null"
        for name, value in composed(common).model.mpo.hyper_parameters.items()
        if value is not None
    ]
    found: dict[str, list[str]] = {}
    for name, section in members.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "cache":
            raise UserError(
                f"members: {name} names a folder: letters, digits, . _ and - (and not `cache`, which holds the tokens)"
            )
        own = _as_typed(section, f"members.{name}", "model.mpo.")
        if isinstance(section, dict) and "objective" in section:
            given = {override.partition("=")[0] for override in own}
            own = [*(null for null in taken_back if null.partition("=")[0] not in given), *own]
        found[name] = [*common, *own]
    return Comparison(seeds, found)


def _as_typed(section: Any, where: str, prefix: str = "") -> list[str]:
    """Overrides as a list, or as a mapping, where `prefix` goes before keys outside of the job's sections."""
    if isinstance(section, list):
        return checked(section, where)
    if not isinstance(section, dict):
        raise UserError(
            f"{where} must be a mapping such as {{objective: dpo, beta: 0.1}} or a list of overrides such as "
            f"[model.mpo.beta=0.1], not {section}"
        )
    paths = {
        str(key) if str(key).split(".")[0] in SECTIONS else f"{prefix}{key}": value
        for key, value in section.items()
    }
    return checked([override for path, value in paths.items() for override in _flat(path, value)], where)


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


def plan_runs(
    comparison: Comparison, members: Sequence[str] | None, output: Path, more: Sequence[str]
) -> list[Run]:
    """All members at the first seed, then at the next one.

    Args:
        members: their names; None: all of the file.
        output: the folder of the comparison.
        more: overrides for all of them, after all others.

    Raises:
        UserError: an unknown member, or overrides that the main job would not take, whatever the data are.
    """
    names = list(comparison.members) if members is None else list(dict.fromkeys(members))
    for name in names:
        if name not in comparison.members:
            near = difflib.get_close_matches(name, comparison.members, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(comparison.members)}"
            raise UserError(f"--members: {name} is no member of the comparison; {hint}")
    check_overrides(checked(more, "the command"))
    for name in names:
        try:
            _check(composed([*comparison.members[name], *more]))
        except ConfigError as error:
            raise UserError(f"member {name}: {error}") from error
    return [
        Run(
            name,
            seed,
            (*comparison.members[name], *more, f"trainer.seed={seed}"),
            output / name / f"seed-{seed}",
        )
        for seed in comparison.seeds
        for name in names
    ]


def _check(config: Config) -> None:
    model = config.model
    objectives.settle(
        objectives.get(model.mpo.objective), model.mpo.hyper_parameters, [f.name for f in fields(MpoConfig)]
    )
    if not Path(model.restore_from_path).is_dir():
        raise ConfigError(
            f"model.restore_from_path={model.restore_from_path} is no folder; give a model's, such as "
            "`bash examples/quickstart.sh` makes"
        )


def composed(overrides: Sequence[str]) -> Config:
    """The main job's configuration with these overrides.

    Raises:
        ConfigError: it would not take them.
    """
    check_overrides(overrides)
    register_schema()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            return parse(compose("mpo_gpt", list(overrides)))
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
