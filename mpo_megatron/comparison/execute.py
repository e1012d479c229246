"""A run as sub-processes: started, or kept when it has finished.

A run's folder has `run.json` (what was asked for and, once the job has ended well, its figures), `job.log` (all that
the job printed), `experiment` (the job's own folder), what `samples` writes and, until it is sampled, `model`.
"""

import json
from pathlib import Path

from mpo_megatron.comparison.plan import Run
from mpo_megatron.comparison.results import figures
from mpo_megatron.errors import UserError
from mpo_megatron.overrides import as_value, what_differs
from mpo_megatron.runtime.commands import JOB, run_to_end, torchrun, what_failed

RECORD, LOG, EXPERIMENT, MODEL = "run.json", "job.log", "experiment", "model"


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
    then, wanted = what_differs(before, now)
    raise UserError(
        f"{run.folder} was run with {then}, and now it is {wanted}: remove that folder to run it anew, or give "
        "another --output"
    )


def settings(run: Run, ranks: int) -> dict[str, str]:
    """What tells one run from another in the same folder."""
    return {"ranks": str(ranks), **run.settings}


def model_of(run: Run) -> Path:
    """The Hugging Face folder of a run that is sampled."""
    return run.folder / EXPERIMENT / "hf" if run.keeps_model else run.folder / MODEL


def execute(run: Run, ranks: int, cache: Path, *, sampled: bool = False) -> dict[str, float]:
    """Run the main job to its end and record its figures. Where it has left a checkpoint, it goes on from there.

    Args:
        ranks: processes of the job on this machine.
        cache: folder for tokens and reference log-probs, unless the overrides give one.
        sampled: whether its model is wanted, in `model_of`, if the job was to keep none.

    Raises:
        UserError: the job failed; with its own sentence.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    _record(run, ranks, None)
    command = [
        *torchrun(ranks),
        str(JOB),
        f"model.data.cache_dir={as_value(str(cache.absolute()))}",
        *run.overrides,
        f"exp_manager.explicit_log_dir={as_value(str((run.folder / EXPERIMENT).absolute()))}",
        "exp_manager.resume_if_exists=true",
    ]
    if sampled:
        command.append(f"model.export_path={as_value(str(model_of(run).absolute()))}")
    log = run.folder / LOG
    with log.open("wb") as file:
        status = run_to_end(command, file, ranks)
    if status:
        raise UserError(what_failed(log.read_text(encoding="utf-8", errors="replace"), status))
    result = figures(run.folder / EXPERIMENT)
    _record(run, ranks, result)
    return result


def _record(run: Run, ranks: int, result: dict[str, float] | None) -> None:
    """Write the record, whole or not at all."""
    content = {"settings": settings(run, ranks), "result": result}
    temporary = run.folder / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(run.folder / RECORD)
