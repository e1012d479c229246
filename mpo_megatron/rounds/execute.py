"""A stage's commands as sub-processes, to their end."""

import shutil
import signal
import sys
import time
from collections.abc import Callable

from mpo_megatron.errors import UserError
from mpo_megatron.rounds import state
from mpo_megatron.rounds.stages import JOB, Command, Stage
from mpo_megatron.runtime.commands import ROOT, run_to_end, torchrun, what_failed

LOG = "stage.log"


def execute(
    stage: Stage, *, keep_checkpoints: bool, say: Callable[[str], None], launcher: str = "local"
) -> bool:
    """Bring a stage to its end: a command that has made its output is not started again, others go on where they were.

    Args:
        say: is given a word when the stage begins.
        launcher: of trainings; see `command_line`.

    Returns:
        Whether something was left to do.

    Raises:
        UserError: a command failed, with its own sentence; or as `state.is_done`, `state.begin` and `state.held` have
            it.
    """
    if state.is_done(stage):
        _tidy(stage, keep_checkpoints)
        return False
    with state.held(stage) as lock:
        # Another process may have done it meanwhile.
        if state.is_done(stage):
            return False
        say("goes on" if state.read(stage) else "begins")
        state.begin(stage)
        began = time.perf_counter()
        for command in stage.commands:
            if not command.output.exists():
                _run(stage, command, lock, launcher)
        state.finish(stage, time.perf_counter() - began)
    _tidy(stage, keep_checkpoints)
    return True


def _run(stage: Stage, command: Command, lock: int, launcher: str) -> None:
    log = stage.folder / LOG
    with log.open("ab") as file:
        start = file.tell()
        arguments, environment = command_line(stage, command, launcher)
        status = run_to_end(
            arguments, file, max(1, command.ranks), environment=environment, keeps=[lock],
            # Slurm's word that the time is up is for examples/slurm.sh.
            passes=[signal.SIGUSR1] if launcher == "slurm" else [],
        )  # fmt: skip
    with log.open("rb") as file:
        file.seek(start)
        printed = file.read().decode(errors="replace")
    if status:
        raise UserError(f"{stage}: {what_failed(printed, status)} (its output: {log})")


def command_line(stage: Stage, command: Command, launcher: str) -> tuple[list[str], dict[str, str]]:
    """What is started, and with which variables.

    Args:
        launcher: of trainings: local (torchrun on this machine) | slurm (examples/slurm.sh, on all nodes of the Slurm
            job that this process runs in).
    """
    if command.program != JOB:
        return [sys.executable, str(command.program), *command.arguments], {}
    if launcher == "local":
        return [*torchrun(command.ranks), str(command.program), *command.arguments], {}
    variables = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MPO_OUTPUT": str((stage.folder / "experiment").absolute()),
        "MPO_PYTHON": sys.executable,
        "MPO_RANKS": str(command.ranks),
    }
    return ["bash", str(ROOT / "examples" / "slurm.sh"), *command.arguments], variables


def _tidy(stage: Stage, keep_checkpoints: bool) -> None:
    """Of a training that is done, the model is there: its checkpoints are needed no more."""
    if not keep_checkpoints and any(command.program == JOB for command in stage.commands):
        shutil.rmtree(stage.folder / "experiment" / "checkpoints", ignore_errors=True)
