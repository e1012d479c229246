"""Whatever stands in a YAML or on the command line: a configuration or one sentence, never anything else."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mpo_megatron import objectives
from mpo_megatron.config import Config, MpoConfig, as_yaml, parse
from mpo_megatron.config.groups import CONF, compose_config
from mpo_megatron.errors import ConfigError
from mpo_megatron.overrides import as_value
from tests.helpers.fuzzing import SCALARS, TEXT, TRIED, changed, check_message, damaged, tries

pytestmark = pytest.mark.usefixtures("inputs_are_counted")


def paths_of(schema: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of all sections and keys."""
    for field in fields(schema):
        yield prefix + field.name
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from paths_of(field.type, f"{prefix}{field.name}.")


PATHS = sorted(paths_of(Config))
OVERRIDDEN = [*PATHS, "gpu", "nodes", "layout", "objective", "gpu@model", "hydra.run.dir", "hydra/launcher"]
KEYS_OF_MPO = [field.name for field in fields(MpoConfig)]
WORDS = st.sampled_from(
    ["???", "null", "bf16", "32", "auto", "cpu", "cached", "none", "dpo", "wmpo", "simpo", "full", "uniform", "hybrid",
     "error", "skip", "0.5", "1e9", "-1", "2", "${model.optim.lr}", "${nothing}", "${", "a=b", "[1,2]", "{a: 1}"]
)  # fmt: skip
KEYS = (
    st.sampled_from(sorted({path.rpartition(".")[2] for path in PATHS} | {"beta", "alpha", "gamma"})) | TEXT
)
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
CHOICES = [
    "h100",
    "2x8",
    "wmpo",
    "llama3_8b/h100_2x8_bf16",
    "${gpu}",
    "${",
    "[1,2]",
    "1,2",
    "{a: 1}",
    "range(3)",
    "null",
]
CHANGES = st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=4)


def check(raw: Any) -> None:
    try:
        config = parse(raw)
    except ConfigError as error:
        check_message(error)
        TRIED["refused"] += 1
    else:
        # What is taken can be written down and taken again; as text, for NaN is not equal to itself.
        written: Any = OmegaConf.create(yaml.safe_load(yaml.safe_dump(as_yaml(config), sort_keys=False)))
        assert repr(parse(written)) == repr(config)
        TRIED["taken"] += 1
        check_hyper_parameters(config)


def check_hyper_parameters(config: Config) -> None:
    """Numbers that an objective can compute with, or a sentence."""
    given = config.model.mpo.hyper_parameters
    try:
        settled = objectives.settle(objectives.get(config.model.mpo.objective), given, KEYS_OF_MPO)
    except ConfigError as error:
        check_message(error)
        TRIED["hyper-parameters refused"] += 1
    else:
        assert all(isinstance(value, str) or math.isfinite(value) for value in settled.values())
        TRIED["hyper-parameters taken"] += 1


@tries(120)
@given(CHANGES)
def test_changed_keys(changes: list[tuple[str, Any]]) -> None:
    raw = OmegaConf.create({"model": {"restore_from_path": "m", "data": {"train": "d.jsonl"}}})
    try:
        for path, value in changes:
            OmegaConf.update(raw, path, value, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError, AssertionError):
        return  # no YAML says so
    check(raw)


@tries(50)
@given(
    st.dictionaries(st.sampled_from(["trainer", "exp_manager", "model", "name"]) | KEYS, VALUES, max_size=4)
)
def test_any_mapping(mapping: dict[Any, Any]) -> None:
    try:
        raw = OmegaConf.create(mapping)
    except (OmegaConfBaseException, ValueError, TypeError):
        return
    check(raw)


WHOLE = {
    "defaults": ["schema", {"gpu": "h100"}, "_self_"],
    "name": "my",
    "trainer": {"precision": 32, "max_steps": 3},
    "exp_manager": {"exp_dir": "e", "name": "${name}"},
    "model": {"restore_from_path": "m", "data": {"train": "t"}, "mpo": {"objective": "mpo", "beta": 0.1}},
}
GPU = {"model": {"tensor_model_parallel_size": 2}}
PIECES = (b"\n", b":", b"[", b"{", b"- ", b"${", b"!!", b"&a", b"*a", b"\t", b"\xff")


def as_bytes(content: Any) -> bytes:
    return yaml.safe_dump(content, sort_keys=False).encode()


@tries(120)
@given(
    changed(WHOLE, VALUES).map(as_bytes) | VALUES.map(as_bytes) | damaged(as_bytes(WHOLE), PIECES),
    st.just(as_bytes(GPU)) | changed(GPU, VALUES).map(as_bytes),
)
def test_any_yaml(content: bytes, group: bytes) -> None:
    """Of the user's own, with a file of a group."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gpu").mkdir()
        (Path(folder) / "my.yaml").write_bytes(content)
        (Path(folder) / "gpu" / "h100.yaml").write_bytes(b"# @package _global_\n" + group)
        try:
            compose_config(Path(folder) / "my.yaml", [])
            TRIED["YAMLs taken"] += 1
        except ConfigError as error:
            check_message(error)
            TRIED["YAMLs refused"] += 1


def check_overrides(overrides: list[str]) -> None:
    """Of a preset, whose groups they may choose of."""
    try:
        compose_config(
            CONF / "llama3_8b.yaml", ["model.restore_from_path=m", "model.data.train=t", *overrides]
        )
        TRIED["overrides taken"] += 1
    except ConfigError as error:
        check_message(error)
        TRIED["overrides refused"] += 1


@tries(100)
@given(
    st.lists(
        st.sampled_from(["gpu=a100_80gb", "~layout", "nodes=2x8", "objective=wmpo", "trainer.max_steps=3"])
        | st.tuples(
            st.sampled_from(["", "", "", "+", "++", "~"]),
            st.sampled_from(OVERRIDDEN),
            st.sampled_from(CHOICES) | VALUES.map(as_value),
        ).map(lambda parts: "{}{}={}".format(*parts)),
        max_size=3,
    )
)
def test_overrides(overrides: list[str]) -> None:
    check_overrides(overrides)


@tries(50)
@given(st.lists(TEXT, min_size=1, max_size=3).map("=".join))
def test_any_override(override: str) -> None:
    check_overrides([override])


@tries(100)
@given(
    st.sampled_from(objectives.names()),
    st.dictionaries(
        st.sampled_from(["beta", "alpha", "gamma", "delta", "tau", "lambda"]) | TEXT, VALUES, max_size=3
    ),
)
def test_hyper_parameters(name: str, found: dict[str, Any]) -> None:
    try:
        raw = OmegaConf.create(
            {"model": {"restore_from_path": "m", "data": {"train": "d"}, "mpo": {"objective": name, **found}}}
        )
    except (OmegaConfBaseException, ValueError, TypeError):
        return
    check(raw)
