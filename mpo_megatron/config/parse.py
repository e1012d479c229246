"""From a YAML and a command line to the schema.

`parse` merges a YAML into the schema's classes: an unknown key, a value of the wrong type or one outside its range
stops the run with the value, the rule and the fix. The result is frozen.
"""

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mpo_megatron.config.rules import check
from mpo_megatron.config.schema import Config, MpoConfig
from mpo_megatron.errors import ConfigError
from mpo_megatron.finite import is_finite


def parse(raw: DictConfig) -> Config:
    """Merge a YAML with Hydra's overrides into the schema and check it.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value, or a broken rule.
    """
    content = OmegaConf.to_container(raw)
    check_keys(content, Config, "")
    check_numbers(content, "")
    try:
        merged = OmegaConf.merge(_schema(), raw)
        assert isinstance(merged, DictConfig)
        _check_missing(merged)
        hyper_parameters = _take_hyper_parameters(merged.model.mpo)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_key(error)}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    mpo = replace(config.model.mpo, hyper_parameters=hyper_parameters)
    config = replace(config, model=replace(config.model, mpo=mpo))
    check(config)
    return config


def as_yaml(config: Config) -> dict[str, Any]:
    """What `parse` makes the same configuration of."""
    found = asdict(config)
    found["model"]["mpo"] |= found["model"]["mpo"].pop("hyper_parameters")
    return found


def changed(config: Config) -> dict[str, str]:
    """The keys whose values are not the schema's defaults, by their paths: what tells one configuration from another,
    whether a YAML or a command line says it.
    """
    defaults = dict(leaves(as_yaml(Config())))
    return {key: str(value) for key, value in leaves(as_yaml(config)) if defaults.get(key) != value}


def leaves(section: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of nested sections by their paths, with their values."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def register_schema(name: str = "schema") -> None:
    """Enter the schema in Hydra's store, so that a YAML with `defaults: [schema, _self_]` takes any known key."""
    ConfigStore.instance().store(name=name, node=_schema())


def _schema() -> DictConfig:
    """The classes as OmegaConf has them, with two sections that take keys not named there: NeMo's, and the
    objective's hyper-parameters beside the keys of `model.mpo`.
    """
    schema: DictConfig = OmegaConf.structured(Config)
    make_writable(schema)
    OmegaConf.set_struct(schema.exp_manager, False)
    OmegaConf.set_struct(schema.model.mpo, False)
    del schema.model.mpo["hyper_parameters"]
    return schema


def _take_hyper_parameters(mpo: DictConfig) -> dict[str, Any]:
    """Take what is no key of MpoConfig out of the section."""
    own = {f.name for f in fields(MpoConfig)} - {"hyper_parameters"}
    found = {str(key): mpo[key] for key in mpo if key not in own}
    for key in found:
        del mpo[key]
    return {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for key, value in found.items()
    }


def check_overrides(arguments: Sequence[str], groups: Collection[str] = ()) -> list[Override]:
    """Check the keys of Hydra's overrides before Hydra does, for a message in one sentence.

    Args:
        groups: names that choose a file of settings (`config.groups`) and are no keys.

    Returns:
        The overrides as Hydra reads them.

    Raises:
        ConfigError: an override names a key that the schema does not have, or cannot be parsed.
    """
    parser = OverridesParser.create()
    parsed = []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            shown = argument if len(argument) <= 200 else f"{argument[:200]}..."
            raise ConfigError(
                f"cannot read the override {shown!r}; write key=value, and in quotes a value with spaces, brackets or "
                "the like: \"key='a value (of mine)'\""
            ) from error
        parsed.append(override)
        key = override.key_or_group
        if key not in groups and not key.startswith(("hydra.", "hydra/", "exp_manager")) and key != "hydra":
            nested: Any = {}
            for part in reversed(key.split(".")):
                nested = {part: nested}
            check_keys(nested, Config, "")
        check_numbers({key: override.value()}, "")
    return parsed


def check_numbers(section: Any, path: str) -> None:
    """Raise ConfigError for a whole number that no float holds: OmegaConf raises OverflowError, without the key."""
    if isinstance(section, dict):
        for key, value in section.items():
            check_numbers(value, f"{path}{key}." if isinstance(value, dict) else f"{path}{key}")
    elif isinstance(section, list):
        for value in section:
            check_numbers(value, path)
    elif isinstance(section, int) and not is_finite(section):
        raise ConfigError(f"{path} is a whole number beyond 1.8e308, the largest that is taken; correct it")


def check_keys(value: Any, schema: type, path: str) -> None:
    """Raise ConfigError for the first key that the schema does not have, with the nearest one that it has.

    Keys of `model.mpo` may be an objective's: `objectives.settle` checks them.
    """
    if not isinstance(value, dict):
        return
    known = {f.name: f for f in fields(schema)}
    for key, below in value.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known keys are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {path}{key}; {hint}")
        section = known[key].type
        if isinstance(section, type) and is_dataclass(section) and section is not MpoConfig:
            check_keys(below, section, f"{path}{key}.")


def make_writable(node: DictConfig) -> None:
    """OmegaConf takes a frozen dataclass for a node that no YAML may change."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            make_writable(child)


def _key(error: Exception) -> str:
    return str(getattr(error, "full_key", None) or "configuration")


def _check_missing(merged: DictConfig) -> None:
    """Raise ConfigError that names every required key without a value: `???`, in the schema or in a YAML."""
    missing = sorted(OmegaConf.missing_keys(merged), reverse=True)
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value; set "
            f"{'it' if len(missing) == 1 else 'them'} in the YAML or as {' '.join(f'{key}=...' for key in missing)}"
        )
