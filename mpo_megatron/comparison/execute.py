"""A run as sub-processes: started, kept when it has finished, ended with this process, its error in a sentence.

A run's folder has `run.json` (what was asked for and, once the job has ended well, its figures), `job.log` (all that
the job printed) and `experiment` (the job's own folder).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

from mpo_megatron.comparison.plan import ROOT, Run, as_value
from mpo_megatron.comparison.results import figures
from mpo_megatron.errors import UserError

JOB = ROOT / "examples" / "mpo_gpt.py"
RECORD, LOG, EXPERIMENT = "run.json", "job.log", "experiment"
# What torchrun is given to end its ranks; it kills them after 30 seconds.
_END_SECONDS = 45.0


def finished(run: Run, ranks: int) -> dict[str, float] | None:
    """The figures of a run that has ended well, None if it is to be started or to go on.

    Raises:
        UserError: the folder holds a run with other settings, of which something would be lost.
    """
    path = run.folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before, result = dict(record["settings"]), record["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what a comparison writes; remove {run.folder}, or give another --output"
        ) from error
    now = settings(run, ranks)
    if before == now:
        return result
    if result is None and not any((run.folder / EXPERIMENT / "checkpoints").glob("*")):
        return None
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    then, wanted = (
        " ".join(f"{key}={said[key]}" if key in said else f"no {key}" for key in changed)
        for said in (before, now)
    )
    raise UserError(
        f"{run.folder} was run with {then}, and now it is {wanted}: remove that folder to run it anew, or give "
        "another --output"
    )


def settings(run: Run, ranks: int) -> dict[str, str]:
    """What tells one run from another in the same folder: the value of each override, by key, and the ranks."""
    return {"ranks": str(ranks), **dict(override.partition("=")[::2] for override in run.overrides)}


def execute(run: Run, ranks: int, cache: Path) -> dict[str, float]:
    """Run the main job to its end and record its figures. Where it has left a checkpoint, it goes on from there.

    Args:
        ranks: processes of the job on this machine.
        cache: folder for tokens and reference log-probs, unless the overrides give one.

    Raises:
        UserError: the job failed; with its own sentence.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    _record(run, ranks, None)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        str(JOB),
        f"model.data.cache_dir={as_value(str(cache.absolute()))}",
        *run.overrides,
        f"exp_manager.explicit_log_dir={as_value(str((run.folder / EXPERIMENT).absolute()))}",
        "exp_manager.resume_if_exists=true",
    ]
    log = run.folder / LOG
    with log.open("wb") as file:
        status = run_to_end(command, file, ranks)
    if status:
        raise UserError(what_failed(log.read_text(encoding="utf-8", errors="replace"), status))
    result = figures(run.folder / EXPERIMENT / "metrics.jsonl")
    _record(run, ranks, result)
    return result


def _record(run: Run, ranks: int, result: dict[str, float] | None) -> None:
    """Write the record, whole or not at all."""
    content = {"settings": settings(run, ranks), "result": result}
    temporary = run.folder / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(run.folder / RECORD)


def run_to_end(command: list[str], log: IO[bytes], ranks: int) -> int:
    """Run a command with this package's code, its output in a file. Returns its status; an interrupt ends it."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A session of its own: an interrupt from the keyboard comes here alone, and torchrun is told once, below.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        finally:
            process.kill()
        raise


def what_failed(printed: str, status: int) -> str:
    """The sentence that a job printed as its error; of a job that broke, the last error of its tracebacks."""
    lines = [line.rpartition("\r")[2].strip() for line in printed.splitlines()]
    sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if sentences:
        return sentences[-1]
    # torchrun's own error says that a process has failed, and no more.
    errors = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines if "ChildFailedError" not in line]
    errors = [line for line in errors if re.match(r"[\w.]*(Error|Exception|Interrupt)(:|$)", line)]
    return errors[-1] if errors else f"the job ended with status {status} and no error message"
