"""The stages as a chain of Slurm jobs: a batch script each, and one that submits them in their order.

Each job runs one stage by tools/run_rounds.py --stage, and begins when those that it reads have ended well. A stage
that is done has no job: after a failure the same command writes what is left. What nothing waits for (the log-probs of
held-out samples) runs beside the next round.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.rounds import state
from mpo_megatron.rounds.stages import JOB, Stage
from mpo_megatron.runtime.commands import ROOT

KINDS = ("sample", "score", "train", "held-out", "held-out-score", "log-probs")
SUBMIT = "submit.sh"
# examples/slurm.sh, which runs the training, is told two minutes before the time is up, and asks to be started again.
_OF_TRAINING = {"signal": "B:USR1@120", "requeue": True, "open-mode": "append"}


def write_chain(
    stages: Sequence[Stage], options: Mapping[str, Any], output: Path, command: Sequence[str]
) -> list[Stage]:
    """Write the scripts of all stages that are not done into OUTPUT/slurm, in the place of older ones.

    Args:
        options: `slurm` of the file of rounds.
        command: what runs the stages: program and arguments, without the name of the stage.

    Returns:
        The stages that have a script.

    Raises:
        UserError: unknown options, or a folder that cannot be written.
    """
    check_options(options)
    left = [stage for stage in stages if (record := state.read(stage)) is None or record.made is None]
    folder = output.absolute() / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.sh"):
            old.unlink()
        for number, stage in enumerate(left, 1):
            _path(folder, number, stage).write_text(
                _script(stage, options, folder, command), encoding="utf-8"
            )
        (folder / SUBMIT).write_text(_chain(left, folder), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return left


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UserError unless `slurm` of a file of rounds has the form that it must have."""
    for name, value in options.items():
        if name == "setup":
            if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
                raise UserError(f"slurm.setup must be a list of lines of shell, not {value}")
        elif name not in ("common", *KINDS):
            raise UserError(f"slurm.{name} is none of setup, common, {', '.join(KINDS)}")
        elif not isinstance(value, dict):
            raise UserError(
                f"slurm.{name} must be a mapping of sbatch's options such as {{time: '08:00:00'}}, not {value}"
            )
        elif isinstance(value.get("time", ""), int | float):
            # YAML reads 24:00:00 as a number of seconds, and sbatch a number as minutes.
            raise UserError(
                f'slurm.{name}.time={value["time"]} must be a text: write it as "HH:MM:SS", in quotes'
            )


def submit(output: Path) -> str:
    """Submit the chain. Returns what sbatch said of each stage.

    Raises:
        UserError: there is no sbatch, or it refuses a script.
    """
    path = output.absolute() / "slurm" / SUBMIT
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch on this machine; run `bash {path}` where there is one")
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        before = f" (submitted before it: {', '.join(done.stdout.split()[1::2])})" if done.stdout else ""
        raise UserError(f"sbatch refused a stage: {said[-1]}{before}")
    return done.stdout


def _path(folder: Path, number: int, stage: Stage) -> Path:
    return folder / f"{number:02d}-{stage.name.replace('/', '-')}.sh"


def _script(stage: Stage, options: Mapping[str, Any], folder: Path, command: Sequence[str]) -> str:
    """A batch script that runs a stage."""
    trains = any(one.program == JOB for one in stage.commands)
    kind = stage.name.rpartition("/")[2]
    given = {
        "job-name": "-".join([*folder.parent.name.split(), *stage.name.split("/")]),
        "output": str(folder / "%x-%j.log"),
        **(_OF_TRAINING if trains else {}),
        **(options.get("common") or {}),
        **(options.get(kind) or {}),
    }
    lines = [f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={value}"
             for name, value in given.items() if value not in (None, False)]  # fmt: skip
    run = [*command, "--stage", stage.name, *(["--launcher", "slurm"] if trains else [])]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {stage.name}; written by tools/run_rounds.py.",
            *lines,
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            *(options.get("setup") or []),
            # In the shell's place, so that Slurm's signals reach it.
            f"exec {shlex.join([sys.executable, *run])}",
            "",
        ]
    )


def _chain(stages: Sequence[Stage], folder: Path) -> str:
    """A script that submits all, each after those that it reads, and prints the number of each job."""
    lines = [
        "#!/usr/bin/env bash",
        "# Submits the stages that are left, each after those that it reads; written by tools/run_rounds.py.",
        "set -euo pipefail",
    ]
    numbers = {stage.name: number for number, stage in enumerate(stages, 1)}
    for stage, number in zip(stages, numbers.values(), strict=True):
        after = [f"${{job{numbers[need.name]}%%;*}}" for need in stage.needs if need.name in numbers]
        option = f' --dependency="afterok:{":".join(after)}" --kill-on-invalid-dep=yes' if after else ""
        lines += [
            f"job{number}=$(sbatch --parsable{option} {shlex.quote(str(_path(folder, number, stage)))})",
            f'echo "{stage.name} ${{job{number}%%;*}}"',
        ]
    return "\n".join([*lines, ""])
