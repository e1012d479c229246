"""The stages of all rounds, in order: which commands, from which stages' outputs. Nothing is started here.

OUTPUT/prompts/           held-out.jsonl, round-1.jsonl, ...
OUTPUT/round-0/           the first policy on the held-out prompts: held-out, held-out-score
OUTPUT/round-R/sample           groups.jsonl: responses of the policy that the round starts from
               score            groups.jsonl: the same with scores
               train            model: the policy that the round ends with; experiment: the job's own folder
               held-out         groups.jsonl: responses of the new policy to the held-out prompts
               held-out-score   groups.jsonl: the same with scores
               log-probs        what the policy and its references make of these (policy.jsonl, ...)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mpo_megatron import objectives
from mpo_megatron.config import MpoConfig, changed
from mpo_megatron.config.groups import CONF, compose_config
from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.overrides import as_value
from mpo_megatron.rollout.parts import digest_of, digest_of_folder
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scoring import source_digest
from mpo_megatron.rounds.config import RoundsConfig
from mpo_megatron.runtime.commands import JOB, ROOT, as_arguments

TOOLS = ROOT / "tools"
# A sample that is empty, or ends in two ways with one text, must not end a night's run.
DEFAULTS = ("model.data.faults.empty=skip", "model.data.faults.unequal_scores=keep")
# Options that say how fast, and not what.
_RESOURCES = ("processes", "device", "batch_size", "batch_tokens", "gpus_per_process", "judge_concurrency",
              "judge_rate", "judge_attempts", "judge_timeout", "judge_first_wait", "judge_prices", "judge_cache",
              "judge_key_variable")  # fmt: skip

# Keys of the main job that say where things lie, beside those of what it reads and writes.
_PLACES = ("model.data.cache_dir", "exp_manager.resume_if_exists")


@dataclass(frozen=True)
class Command:
    """A program of this repository with its arguments, which makes `output` whole or not at all."""

    program: Path
    arguments: tuple[str, ...]
    output: Path
    ranks: int = 0  # of torchrun; 0: it is started by itself


@dataclass(frozen=True)
class Stage:
    """What is done as a whole: its commands one after the other.

    Attributes:
        name: unique, and its folder's place in the output folder.
        settings: what the outputs depend on, beside what `needs` has made.
        needs: the stages whose outputs it reads.
        resumes: what in the folder a start of it can go on from, as glob patterns.
    """

    name: str
    folder: Path
    commands: tuple[Command, ...]
    settings: dict[str, str]
    needs: tuple["Stage", ...]
    resumes: tuple[str, ...] = ("*.parts",)

    @property
    def outputs(self) -> list[Path]:
        return [command.output for command in self.commands]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Round:
    """The stages of a round by their kinds; round 0 has held-out samples alone."""

    number: int
    stages: dict[str, Stage] = field(default_factory=dict)

    def path(self, kind: str) -> Path:
        """The output of a stage that has one."""
        (output,) = self.stages[kind].outputs
        return output


def plan_rounds(
    config: RoundsConfig, output: Path, held_out: Sequence[Record], prompts: Sequence[Sequence[Record]]
) -> list[Round]:
    """All rounds, from 0.

    Args:
        prompts: of each round.

    Raises:
        UserError: the first policy, or what scores, is not there, or overrides that the main job would not take.
    """
    scorer, function = config.score.get("model"), config.score.get("function")
    for key, folder in (("model", config.model), ("score.model", scorer)):
        if folder is not None and not (Path(folder) / "config.json").is_file():
            raise UserError(f"{key}={folder} has no config.json; give a Hugging Face model's folder")
    plan = _Plan(
        config,
        output,
        held_out=digest_of(list(held_out)),
        first=digest_of_folder(Path(config.model)),
        scorer={
            **({"the model in score.model": digest_of_folder(Path(scorer))} if scorer else {}),
            **({"the module of score.function": source_digest(function)} if function else {}),
        },
    )
    rounds = [Round(0, plan.measured(0, None))]
    for number in range(1, config.rounds + 1):
        rounds.append(plan.round(number, rounds[-1], digest_of(list(prompts[number - 1]))))
    return rounds


def prompts_file(output: Path, number: int) -> Path:
    """Where the prompts of a round lie; 0: the held-out ones."""
    return output / "prompts" / (f"round-{number}.jsonl" if number else "held-out.jsonl")


@dataclass(frozen=True)
class _Plan:
    config: RoundsConfig
    output: Path
    held_out: str  # digest of the held-out prompts
    first: str  # digest of the first policy
    scorer: dict[str, str]  # digests of the model and the function that score

    def round(self, number: int, before: Round, prompts: str) -> Round:
        """A round after another one; `prompts`: their digest."""
        start = before.stages.get("train")
        sample = self._sample("sample", number, start, self.config.sampling(number), prompts)
        score = self._score("score", number, sample)
        train = self._train(number, score, before.stages["held-out-score"], start)
        stages = {"sample": sample, "score": score, "train": train, **self.measured(number, train)}
        stages["log-probs"] = self._log_probs(number, stages["held-out"], train, start)
        return Round(number, stages)

    def measured(self, number: int, train: Stage | None) -> dict[str, Stage]:
        """The held-out samples of the policy that a training has made; None: of the first one."""
        sample = self._sample("held-out", number, train, self.config.sampling(0), self.held_out)
        return {"held-out": sample, "held-out-score": self._score("held-out-score", number, sample)}

    def _folder(self, kind: str, number: int) -> tuple[str, Path]:
        name = f"round-{number}/{kind}"
        return name, self.output / name

    def _model(self, train: Stage | None) -> Path:
        return Path(self.config.model) if train is None else train.outputs[0]

    def _policy(self, train: Stage | None) -> dict[str, str]:
        return {"the model": self.first} if train is None else {}

    def _sample(
        self, kind: str, number: int, start: Stage | None, options: dict[str, Any], prompts: str
    ) -> Stage:
        name, folder = self._folder(kind, number)
        is_held_out = kind == "held-out"
        # Held-out samples of all rounds are drawn with the same numbers, those to train on with others each time.
        seed = self.config.seed if is_held_out else self.config.seed + number
        options = {**options, "seed": seed}
        file = prompts_file(self.output, 0 if is_held_out else number)
        output = folder / "groups.jsonl"
        given = ("--model", str(self._model(start)), "--prompts", str(file), "--output", str(output))
        command = Command(TOOLS / "generate.py", (*given, *as_arguments(options)), output)
        settings = {"the prompts": prompts, **self._policy(start), **_settings(options)}
        return Stage(name, folder, (command,), settings, (start,) if start else ())

    def _score(self, kind: str, number: int, sample: Stage) -> Stage:
        name, folder = self._folder(kind, number)
        output = folder / "groups.jsonl"
        given = ("--input", str(sample.outputs[0]), "--output", str(output), *as_arguments(self.config.score))
        command = Command(TOOLS / "score.py", given, output)
        settings = {**_settings(self.config.score), **self.scorer}
        return Stage(name, folder, (command,), settings, (sample,))

    def _train(self, number: int, score: Stage, held_out: Stage, start: Stage | None) -> Stage:
        name, folder = self._folder("train", number)
        given = [*DEFAULTS, *self.config.overrides(number)]
        reference: dict[str, str] = {}
        if self.config.reference == "first" and start is not None:
            reference = {"model.mpo.reference_from_path": self.config.model}
        places: dict[str, Path | str] = {
            "model.restore_from_path": self._model(start),
            "model.data.train": score.outputs[0],
            "model.data.validation": held_out.outputs[0],
            "model.export_path": folder / "model",
            "exp_manager.explicit_log_dir": folder / "experiment",
            **reference,
        }
        cache = f"model.data.cache_dir={as_value(str((self.output / 'cache').absolute()))}"
        overrides = [
            cache,
            *given,
            *(f"{key}={as_value(str(Path(path).absolute()))}" for key, path in places.items()),
            "exp_manager.resume_if_exists=true",
        ]
        train = self.config.train
        # A path, or the name of one of conf/.
        yaml = Path(
            train.config if train.config.endswith(".yaml") else CONF / f"{train.config}.yaml"
        ).absolute()
        try:
            asked = _job_settings(yaml, overrides)
        except ConfigError as error:
            raise UserError(f"round {number}: {error}") from error
        own = () if yaml.parent == CONF else ("--config-dir", str(yaml.parent))
        command = Command(
            JOB, (*own, "--config-name", yaml.stem, *overrides), folder / "model", ranks=train.ranks
        )
        settings = {"reference": self.config.reference} | {
            key: value for key, value in asked.items() if key not in (*places, *_PLACES)
        }
        if reference or start is None:
            settings["the model"] = self.first
        needs = (score, held_out, *((start,) if start else ()))
        return Stage(name, folder, (command,), settings, needs, ("experiment/checkpoints/step_*", "*.parts"))

    def _log_probs(self, number: int, held_out: Stage, train: Stage, start: Stage | None) -> Stage:
        name, folder = self._folder("log-probs", number)
        models = {"policy": train, "start": start, "first": None}
        if start is None:
            del models["first"]
        options = as_arguments(self.config.log_probs)
        commands = [
            Command(
                TOOLS / "logprobs.py",
                ("--model", str(self._model(of)), "--input", str(held_out.outputs[0]),
                 "--output", str(folder / f"{which}.jsonl"), *options),
                folder / f"{which}.jsonl",
            )
            for which, of in models.items()
        ]  # fmt: skip
        settings = {"the first model": self.first, **_settings(self.config.log_probs)}
        needs = (held_out, train, *((start,) if start else ()))
        return Stage(name, folder, tuple(commands), settings, needs)


def _settings(options: dict[str, Any]) -> dict[str, str]:
    names = {name.replace("-", "_"): value for name, value in options.items()}
    return {name: str(value) for name, value in names.items() if name not in _RESOURCES}


def _job_settings(yaml: Path, overrides: Sequence[str]) -> dict[str, str]:
    """What the main job is asked for, by its YAML and these overrides, which are checked."""
    config = compose_config(yaml, overrides)
    objectives.settle(
        objectives.get(config.model.mpo.objective),
        config.model.mpo.hyper_parameters,
        [f.name for f in fields(MpoConfig)],
    )
    return changed(config)
