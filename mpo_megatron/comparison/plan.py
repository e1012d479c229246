"""A comparison file, and the runs that it asks for. Nothing is started here.

    seeds: [1, 2, 3]
    common:                                   # of every member: keys of the main job, as in its YAML
      trainer: {max_steps: 100}
    members:
      dpo: {objective: dpo, beta: 0.1}        # keys of model.mpo
      mpo_pairs: {objective: mpo, beta: 0.1, model.data.keep_best: 1, model.data.keep_worst: 1}    # and any others
      mpo_typed: [model.mpo.objective=mpo, model.mpo.alpha=null]            # or overrides, as on the command line
    baseline: dpo                             # what the others are compared with, group by group; else the first
    sweep: {beta: [0.01, 0.1]}                # every member at all of these values; see `sweep`
    samples:                                  # of the models after training, and of the starting model; see `samples`
      generate: {prompts: prompts.jsonl, samples: 2}

A mapping that names an objective gives its hyper-parameters, too: those that conf/mpo_gpt.yaml or `common` set are of
another objective, and are taken back. A seed is `trainer.seed`: the order of the groups is the same for all members.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from mpo_megatron import objectives
from mpo_megatron.comparison.overrides import MPO, as_typed, checked
from mpo_megatron.comparison.samples import START, Samples, read_samples
from mpo_megatron.comparison.sweep import points
from mpo_megatron.config import Config, MpoConfig, changed, check_overrides
from mpo_megatron.config.groups import CONF, compose_config
from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.overrides import read_yaml
from mpo_megatron.rollout.parts import digest_of_folder

KEYS = ("seeds", "common", "members", "baseline", "sweep", "samples")
DEFAULTS = (
    # Groups that say nothing to some objectives are left out for all of them, so that every step has the same groups.
    "model.data.require_preferred=true",
    # All are measured by the same responses and scores, whatever selection or noise they train on.
    "model.data.validate_on=all",
    "trainer.log_val_groups=true",
)
# What the output has beside the members' folders.
TAKEN = ("cache", "lock", START)


@dataclass(frozen=True)
class Member:
    """What is run for each seed.

    Attributes:
        overrides: of the main job, those of all members included.
        base: its name before the sweep.
        point: its value on each axis of the sweep.
    """

    overrides: list[str]
    base: str
    point: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What a comparison file says.

    Attributes:
        members: by name, each at every point of the sweep.
        baseline: one of their names before the sweep.
        samples: None: none are taken.
    """

    seeds: list[int]
    members: dict[str, Member]
    baseline: str
    samples: Samples | None = None


@dataclass(frozen=True)
class Run:
    """One member at one seed.

    Attributes:
        settings: what its figures depend on: keys of the job, and digests of what its data and models hold.
        start: the folder of the starting model.
        keeps_model: whether the job leaves a Hugging Face folder in its own.
    """

    member: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    settings: dict[str, str] = field(default_factory=dict, hash=False)
    start: Path = Path()
    keeps_model: bool = False

    def __str__(self) -> str:
        return f"{self.member}, seed {self.seed}"


def read_comparison(path: Path) -> Comparison:
    """Read a comparison file.

    Raises:
        UserError: it is not there, or not as it must be.
    """
    content = read_yaml(path)
    try:
        return _comparison(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _comparison(content: Any) -> Comparison:
    if not isinstance(content, dict) or not content.keys() <= set(KEYS):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else "a list"
        raise UserError(f"a comparison has the keys {', '.join(KEYS[:-1])} and {KEYS[-1]}, not {keys}")
    seeds, members = content.get("seeds"), content.get("members")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"seeds must be a list of whole numbers such as [1, 2, 3], not {seeds}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={seeds} has one of them twice; remove it")
    if not isinstance(members, dict) or not members:
        raise UserError(
            "members must give a name and overrides for each run, such as `dpo: {objective: dpo, beta: 0.1}`"
        )
    baseline = content.get("baseline", next(iter(members)))
    if baseline not in list(members):  # whatever it is: a list has no hash
        raise UserError(f"baseline={baseline} is no member; there are {', '.join(map(str, members))}")
    found = _members(members, as_typed(content.get("common") or {}, "common"), content.get("sweep"))
    return Comparison(seeds, found, baseline, read_samples(content.get("samples"), seeds))


def _members(members: dict[Any, Any], common: list[str], sweep: Any) -> dict[str, Member]:
    """By name, each at every point of the sweep."""
    common = [*DEFAULTS, *common]
    taken_back = [
        f"{MPO}{name}=null"
        for name, value in composed(common).model.mpo.hyper_parameters.items()
        if value is not None
    ]
    grid = points(sweep)
    found: dict[str, Member] = {}
    for name, section in members.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in TAKEN:
            raise UserError(
                f"members: {name} names a folder: letters, digits, . _ and - (and not {', '.join(TAKEN)}: these are "
                "the comparison's own)"
            )
        own = as_typed(section, f"members.{name}", prefix=MPO)
        for point in grid:
            chosen = [*own, *point.overrides]
            if isinstance(section, dict) and "objective" in section:
                given = {override.partition("=")[0] for override in chosen}
                chosen = [*(null for null in taken_back if null.partition("=")[0] not in given), *chosen]
            if name + point.suffix in found:
                raise UserError(
                    f"members: {name}{point.suffix} is a point of the sweep, too; give it another name"
                )
            found[name + point.suffix] = Member([*common, *chosen], name, point.values)
    return found


def plan_runs(
    comparison: Comparison, members: Sequence[str] | None, output: Path, more: Sequence[str]
) -> list[Run]:
    """All members at the first seed, then at the next one.

    Args:
        members: their names, before the sweep or at a point of it; None: all of the file.
        output: the folder of the comparison.
        more: overrides for all of them, after all others.

    Raises:
        UserError: an unknown member, or overrides that the main job would not take, whatever the data are.
    """
    names = list(comparison.members) if members is None else _chosen(comparison, members)
    check_overrides(checked(more, "the command"))
    configs = {}
    for name in names:
        try:
            configs[name] = _check(composed([*comparison.members[name].overrides, *more]))
        except ConfigError as error:
            raise UserError(f"member {name}: {error}") from error
    starts = {name: Path(config.model.restore_from_path) for name, config in configs.items()}
    if comparison.samples is not None and len(set(starts.values())) > 1:
        raise UserError(
            f"members begin at {len(set(starts.values()))} models; with `samples` they begin at one, "
            "model.restore_from_path in `common`"
        )
    digest = cache(digest_of_folder)
    settings = {name: _settings(config, digest) for name, config in configs.items()}
    return [
        Run(
            name,
            seed,
            (*comparison.members[name].overrides, *more, f"trainer.seed={seed}"),
            output / name / f"seed-{seed}",
            {**settings[name], "trainer.seed": str(seed)},
            starts[name],
            configs[name].model.export_path is None,
        )
        for seed in comparison.seeds
        for name in names
    ]


def _settings(config: Config, digest: Callable[[Path], str]) -> dict[str, str]:
    """What the figures of a run depend on, but for its seed."""
    model = config.model
    read = {
        "model.restore_from_path": model.restore_from_path,
        "model.mpo.reference_from_path": model.mpo.reference_from_path,
        "model.data.train": model.data.train,
        "model.data.validation": model.data.validation,
    }
    return changed(config) | {
        f"what {key} holds": digest(Path(path))
        for key, path in read.items()
        # The hub's names are no paths.
        if path is not None and Path(path).exists()
    }


def _chosen(comparison: Comparison, asked: Sequence[str]) -> list[str]:
    """The members of these names, in the order asked for; a name before the sweep is of all its points."""
    known = [*dict.fromkeys([*(member.base for member in comparison.members.values()), *comparison.members])]
    found: list[str] = []
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"--members: {name} is no member of the comparison; {hint}")
        found += [other for other, member in comparison.members.items() if name in (other, member.base)]
    return list(dict.fromkeys(found))


def _check(config: Config) -> Config:
    model = config.model
    objectives.settle(
        objectives.get(model.mpo.objective), model.mpo.hyper_parameters, [f.name for f in fields(MpoConfig)]
    )
    if not Path(model.restore_from_path).is_dir():
        raise ConfigError(
            f"model.restore_from_path={model.restore_from_path} is no folder; give a model's, such as "
            "`bash examples/quickstart.sh` makes"
        )
    if model.export_path:
        raise ConfigError(
            f"model.export_path={model.export_path} would be written by every run; remove it, or keep no model with "
            'model.export_path=""'
        )
    if not model.data.validation:
        raise ConfigError(
            "model.data.validation has no value, and a comparison is of held-out groups; give it"
        )
    return config


def composed(overrides: Sequence[str]) -> Config:
    """The main job's configuration with these overrides.

    Raises:
        ConfigError: it would not take them.
    """
    return compose_config(CONF / "mpo_gpt.yaml", overrides)
