"""The experiment folder and its loggers, through NeMo's exp_manager.

The training loop is ours, so exp_manager gets a bare Lightning trainer: it makes the folder and attaches the loggers
(TensorBoard, Weights & Biases, MLflow) that the YAML asks for.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mpo_megatron.config import Config
from mpo_megatron.errors import ConfigError
from mpo_megatron.training.metrics_file import MetricsFile
from mpo_megatron.training.report import say

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
# What exp_manager would do for a Lightning training loop, and this job does itself.
_OURS = {"create_checkpoint_callback": False, "create_preemption_callback": False, "resume_if_exists": False}


class Experiment:
    """Rank 0's folder and loggers. `log` writes one JSON line to metrics.jsonl and the numbers to every logger.

    `history` and `rewind` are those of the `MetricsFile`.
    """

    def __init__(self, folder: Path, loggers: list[Any]) -> None:
        self.folder = folder
        self.loggers = loggers
        self._lines = MetricsFile(folder / METRICS_FILE)
        if self._lines.damaged:
            say(
                f"warning: {folder / METRICS_FILE} had {self._lines.damaged} damaged lines, which are dropped: the "
                "metrics of these steps are lost, and nothing else"
            )
        self.history = self._lines.read
        self.rewind = self._lines.rewind

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Record the values of optimizer step `step` (0: before training); split is `train` or `validation`."""
        self.note(step, split, values)
        for logger in self.loggers:
            logger.log_metrics({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def note(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Record what is no number of a logger: a line of metrics.jsonl alone."""
        self._lines.append({"step": step, "split": split, **values})

    def close(self) -> None:
        """Flush and close the loggers."""
        self._lines.close()
        for logger in self.loggers:
            logger.finalize("success")


def experiment_folder(config: Config) -> Path | None:
    """The folder of a run that is to be resumed: without a version in its name, so that the next start finds it."""
    section = config.exp_manager
    if section.get("explicit_log_dir"):
        return Path(section["explicit_log_dir"])
    if section.get("resume_if_exists"):
        return Path(section.get("exp_dir") or "experiments") / (section.get("name") or config.name)
    return None


def start_experiment(config: Config) -> Experiment:
    """Make the folder and loggers; to be called on rank 0 only.

    Raises:
        ConfigError: exp_manager does not accept its section, or the folder holds another run's checkpoints.
    """
    from lightning.pytorch import Trainer
    from nemo.utils.exp_manager import exp_manager

    section = {**config.exp_manager, **_OURS}
    resumes = bool(config.exp_manager.get("resume_if_exists"))
    fixed = experiment_folder(config)
    if fixed is not None:
        section = {**section, "explicit_log_dir": str(fixed), "exp_dir": None, "version": None}
        if not resumes and any((fixed / CHECKPOINTS).glob("*")):
            raise ConfigError(
                f"{fixed} holds the checkpoints of an earlier run; set exp_manager.resume_if_exists=true to go on with "
                "it, or choose another folder"
            )
    with _quiet():
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        try:
            with _left_alone(fixed / METRICS_FILE if resumes and fixed is not None else None):
                folder = exp_manager(trainer, OmegaConf.create(section))
        except Exception as error:
            raise ConfigError(f"exp_manager: {' '.join(str(error).split())}") from error
    assert folder is not None
    return Experiment(Path(folder), [logger for logger in trainer.loggers if logger is not None])


@contextmanager
def _left_alone(path: Path | None) -> Iterator[None]:
    """A block that takes the file for absent: exp_manager moves an earlier start's files into run_N, and folders not.

    It is nowhere else at any moment, so that a start that is killed within leaves it for the next one.
    """
    if path is None:
        yield
        return
    aside = path.parent / ".start" / path.name
    if path.is_file():
        aside.parent.mkdir(exist_ok=True)
        path.replace(aside)
    try:
        yield
    finally:
        if aside.is_file():
            aside.replace(path)
            aside.parent.rmdir()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the set-up chatter of NeMo and Lightning from the screen; warnings and errors of ours still come through."""
    from nemo.utils import logging as nemo_logging

    level = nemo_logging.getEffectiveLevel()
    nemo_logging.setLevel(logging.ERROR)
    lightning = logging.getLogger("lightning.pytorch")
    before = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        nemo_logging.setLevel(level)
        lightning.setLevel(before)
