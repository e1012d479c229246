"""The YAML of tools/run_rounds.py: every default and every check that needs no prompts and no model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mpo_megatron.config import check_keys, check_numbers, make_writable
from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.overrides import as_typed, read_yaml

# What the rounds set in every training, by key, and where it is said instead.
OWN = {
    "model.restore_from_path": "`model` in the first round, and by the round before in others",
    "model.mpo.reference_from_path": "`reference`",
    "model.data.train": "the samples of the round",
    "model.data.validation": "the samples on the held-out prompts",
    "model.export_path": "--output",
    "exp_manager.explicit_log_dir": "--output",
    "exp_manager.resume_if_exists": "the rounds, whose trainings go on from their newest checkpoint",
}
# Options of tools/generate.py that the rounds set.
OWN_SAMPLING = ("model", "prompts", "output", "split", "limit", "seed")
OWN_SCORING = ("input", "output", "summary_only")
OWN_LOG_PROBS = ("input", "output", "model")


@dataclass(frozen=True)
class PromptsConfig:
    """JSONL files as tools/generate.py reads them; of a file with a split, the lines of that "split"."""

    train: str = MISSING  # prompts to sample and train on
    train_split: str | None = None
    held_out: str = MISSING  # prompts to measure on
    held_out_split: str | None = None
    each_round: str = (
        "own"  # own (each round has prompts that no other has, drawn by `seed`) | all (all have all)
    )
    limit: int | None = None  # prompts of a round at most
    held_out_limit: int | None = None  # the first so many


@dataclass(frozen=True)
class TrainConfig:
    """The main job."""

    config: str = "mpo_gpt"  # its YAML: conf/NAME.yaml, or the path of another
    ranks: int = 1  # processes on this machine
    overrides: Any = None  # for all rounds: as a list, or as a mapping


@dataclass(frozen=True)
class RoundsConfig:
    """The whole YAML. Options of a tool are a mapping of its names: {top-p: 0.9} or {top_p: 0.9}."""

    model: str = MISSING  # the first policy: Hugging Face folder of an instruct model
    rounds: int = MISSING
    seed: int = 0  # of the split over the rounds, and of all samples
    # Of the training: previous (the policy that the round starts from) | first (`model`, in all rounds).
    reference: str = "previous"
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sample: dict[str, Any] = field(default_factory=dict)  # options of tools/generate.py
    held_out: dict[str, Any] = field(
        default_factory=dict
    )  # the same on held-out prompts; what is left out is as above
    score: dict[str, Any] = field(default_factory=dict)  # options of tools/score.py
    log_probs: dict[str, Any] = field(default_factory=dict)  # options of tools/logprobs.py
    train: TrainConfig = field(default_factory=TrainConfig)
    # For each round, what is its own: overrides of the main job, and `sample` with options.
    per_round: list[Any] = field(default_factory=list)
    keep_checkpoints: bool = False  # of a training that has ended: its model is there in any case
    # Options of sbatch: `common`, and by the name of a stage; `setup`: lines of shell before the command.
    slurm: dict[str, Any] = field(default_factory=dict)

    def sampling(self, number: int) -> dict[str, Any]:
        """Options of the sampler in a round, from 1; of the held-out samples: 0."""
        more = self.held_out if number == 0 else self._own(number).get("sample") or {}
        return {**_normal(self.sample), **_normal(more)}

    def overrides(self, number: int) -> list[str]:
        """Overrides of the main job in a round, from 1: those of all, and after them its own."""
        own = {key: value for key, value in self._own(number).items() if key != "sample"}
        return [
            *as_typed(self.train.overrides or {}, "train.overrides", OWN),
            *as_typed(own, f"per_round[{number - 1}]", OWN),
        ]

    def _own(self, number: int) -> dict[str, Any]:
        return dict(self.per_round[number - 1] or {}) if self.per_round else {}


def _normal(options: dict[str, Any]) -> dict[str, Any]:
    return {str(name).replace("-", "_"): value for name, value in options.items()}


def read_config(path: Path, overrides: Sequence[str] = ()) -> RoundsConfig:
    """Read a file of rounds.

    Args:
        overrides: of its keys, as key=value.

    Raises:
        UserError: it is not there, or not as it must be.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with the keys of conf/rounds/smollm2.yaml")
    try:
        more = OmegaConf.to_container(OmegaConf.from_dotlist(_checked(overrides)))
        for part in (content, more):
            check_keys(part, RoundsConfig, "")
            check_numbers(part, "")
        schema = OmegaConf.structured(RoundsConfig)
        make_writable(schema)
        merged = OmegaConf.merge(schema, content, more)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{' and '.join(missing)} must be given")
        config = OmegaConf.to_object(merged)
        assert isinstance(config, RoundsConfig)
        _check(config)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "a value"
        raise UserError(f"{path}: {where}: {str(error).splitlines()[0]}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def _checked(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override} is no override; write key=value, such as rounds=3")
    return list(overrides)


def _check(config: RoundsConfig) -> None:
    if config.rounds < 1:
        raise UserError(f"rounds={config.rounds} must be 1 or more")
    if config.train.ranks < 1:
        raise UserError(f"train.ranks={config.train.ranks} must be 1 or more")
    for key, value, values in (
        ("reference", config.reference, ("previous", "first")),
        ("prompts.each_round", config.prompts.each_round, ("own", "all")),
    ):
        if value not in values:
            raise UserError(f"{key}={value} must be {' or '.join(values)}")
    for key, limit in (("limit", config.prompts.limit), ("held_out_limit", config.prompts.held_out_limit)):
        if limit is not None and limit < 1:
            raise UserError(f"prompts.{key}={limit} leaves no prompt; give at least 1")
    if config.per_round and len(config.per_round) != config.rounds:
        raise UserError(
            f"per_round has {len(config.per_round)} entries for {config.rounds} rounds; give one for each"
        )
    for number, own in enumerate(config.per_round):
        if own is not None and not isinstance(own, dict):
            raise UserError(
                f"per_round[{number}] must be a mapping such as {{model.optim.lr: 5e-7}}, not {own}"
            )
    for key, options, taken in (
        ("sample", config.sample, OWN_SAMPLING),
        ("held_out", config.held_out, OWN_SAMPLING),
        ("score", config.score, OWN_SCORING),
        ("log_probs", config.log_probs, OWN_LOG_PROBS),
        *((f"per_round[{i}].sample", own["sample"] or {}, OWN_SAMPLING)
          for i, own in enumerate(config.per_round) if own and "sample" in own),
    ):  # fmt: skip
        if not isinstance(options, dict):
            raise UserError(f"{key} must be a mapping of options such as {{samples: 4}}, not {options}")
        for name in _normal(options):
            if name in taken:
                raise UserError(f"{key}.{name} is set by the rounds; remove it")
    for number in range(config.rounds + 1):
        samples = config.sampling(number).get("samples", 2)
        if isinstance(samples, int) and samples < 2:
            where = (
                f"of round {number}"
                if number
                else "of the held-out prompts, which are the trainings' validation"
            )
            raise UserError(f"samples={samples} {where}: a group needs 2 or more")
        if number:
            config.overrides(number)
