"""The job, top-down: prepare, build, steps with validation and checkpoints, export, closing table."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import yaml

from mpo_megatron.config import Config, as_yaml
from mpo_megatron.conversion.export import export_hf
from mpo_megatron.errors import UserError
from mpo_megatron.runtime.parallel import shutdown
from mpo_megatron.runtime.parent import end_forks_with_this_process
from mpo_megatron.runtime.pulse import Pulse, start_pulse
from mpo_megatron.scheduling.rows import StepRows
from mpo_megatron.training.checkpoint import all_checkpoints, folder_of
from mpo_megatron.training.data_parallel import current_models
from mpo_megatron.training.experiment import CHECKPOINTS, Experiment
from mpo_megatron.training.guard import NotFinite
from mpo_megatron.training.job import Job, build_job, start_masters
from mpo_megatron.training.masters import master_values
from mpo_megatron.training.profiling import ProfileWindow
from mpo_megatron.training.report import TrainingBar, before_after, plot_run, say
from mpo_megatron.training.resume import IDENTITY_FILE, identity, resume
from mpo_megatron.training.retention import VALIDATION_FILE, remove_superfluous
from mpo_megatron.training.setup import EXPORT_DTYPES, prepare
from mpo_megatron.training.skips import Skips
from mpo_megatron.training.step import objective_pass
from mpo_megatron.training.validation import validate
from mpo_megatron.training.watch import Watch


def train(config: Config) -> None:
    """Run the job that the configuration describes. Every rank calls it.

    Raises:
        UserError: configuration, data, machine or checkpoint are not as they must be.
    """
    end_forks_with_this_process()
    job, pulse = None, None
    try:
        setup = prepare(config)
        pulse = start_pulse(setup.layout, config.trainer.heartbeat_timeout_minutes)
        job = build_job(setup)
        start = resume(job)
        export_missing(job)
        if start == 0:
            start_masters(job)
            validate(job, 0)
        if (stopped := run_steps(job, start)) is None:
            finish(job)
        else:
            leave(job, stopped)
    except UserError:
        # On all ranks alike; after any other error, ending the groups could wait for ranks inside one.
        if job is not None:
            complete_save(job, wait=True)
        end(pulse)
        raise
    except Exception as error:
        lost = {} if pulse is None else pulse.silent()
        if not lost:
            raise
        raise lost_rank(lost, error, setup.layout.rank) from error
    end(pulse)


def end(pulse: Pulse | None) -> None:
    """End the signs of life and the groups, where all ranks have come to it."""
    if pulse is not None:
        pulse.close()
    shutdown()


def lost_rank(lost: Mapping[int, str], error: Exception, rank: int) -> UserError:
    """What to say where ranks have gone without a word; said here where rank 0, which says errors, is among them."""
    sentence = UserError(
        f"{', '.join(lost.values())} has ended or hangs ({' '.join(str(error).split())[:200]}); look at that node's "
        "log, and start the same command again with exp_manager.resume_if_exists=true"
    )
    if 0 in lost and rank == 1:
        print(f"\nerror: {sentence}", file=sys.stderr, flush=True)
    return sentence


def run_steps(job: Job, start: int) -> int | None:
    """Train from step `start` to the end, with validations and checkpoints in between.

    Returns:
        The step after which SIGTERM has ended it before; None: it is at its end.
    """
    trainer = job.setup.config.trainer
    val_every = trainer.val_check_interval
    if 0 < val_every < 1:
        val_every = max(1, round(val_every * job.setup.steps_per_epoch))
    skips, watch = Skips(job), Watch(trainer.watch_window)
    source = job.setup.train.source.steps(job.setup.train.steps[start:])
    training_bar = closing(TrainingBar(job.total_steps, start, shown=job.is_main))
    with training_bar as bar, source as steps, ProfileWindow(job) as window, job.stop.listening():
        for step in range(start + 1, job.total_steps + 1):
            with window.step(step):
                values = guarded_step(job, step, steps, skips)
            bar.advance(values)
            if skips.in_a_row >= trainer.max_skipped_steps:
                give_up(job, step, skips)
            complete_save(job, wait=False)
            last = step == job.total_steps
            saves = (last and trainer.save_at_end) or (
                trainer.save_interval and step % trainer.save_interval == 0
            )
            if values is not None and (step % trainer.log_every_n_steps == 0 or last):
                job.log(step, "train", values)
            if values is not None and job.is_main:
                for sentence in watch.add(values):
                    say(f"warning: step {step}: {sentence}")
            metrics: dict[str, float] = {}
            is_compared = saves and trainer.checkpoint.save_top_k != -1
            if last or is_compared or (val_every and step % int(val_every) == 0):
                metrics = validate(job, step)
            stops = job.stop.agreed and not last
            if saves or (stops and saves_any(job)):
                save(job, step, metrics)
            if stops:
                return step
    return None


def saves_any(job: Job) -> bool:
    """Whether the run is to leave checkpoints."""
    trainer = job.setup.config.trainer
    return bool(trainer.save_at_end or trainer.save_interval)


def close(job: Job) -> Experiment | None:
    """Wait for all that is being written, and tidy up. Returns rank 0's experiment."""
    complete_save(job, wait=True)
    job.writer.close()
    if job.experiment is not None:
        job.experiment.close()
        job.exports.wait()
        thin_out(job)
    return job.experiment


def leave(job: Job, step: int) -> None:
    """End a run after `step`, before its last one, and say how to go on."""
    if close(job) is None:
        return
    line = f"SIGTERM has ended the run after step {step} of {job.total_steps}"
    if not saves_any(job):
        say(f"{line}; no state is saved, as configured")
        return
    how = "the same command goes on there"
    if not job.setup.config.exp_manager.get("resume_if_exists"):
        how = (
            "the same command goes on there with exp_manager.resume_if_exists=true "
            f"exp_manager.explicit_log_dir={job.folder}"
        )
    say(f"{line}; its state is in {folder_of(job.folder / CHECKPOINTS, step)}, and {how}")


def guarded_step(job: Job, step: int, steps: Iterator[StepRows], skips: Skips) -> dict[str, float] | None:
    """`train_step`; None where the step is left out, since its loss or gradient is not finite.

    The learning rate goes on all the same: it is a function of the step.
    """
    try:
        values = train_step(job, step, steps)
    except NotFinite as found:
        job.schedule.step(1)
        skips.add(step, found)
        return None
    skips.end()
    return values


def give_up(job: Job, step: int, skips: Skips) -> NoReturn:
    """End a run that has left out too many steps in a row, with the state that it had before them.

    Raises:
        UserError: always; on all ranks.
    """
    first = step - skips.in_a_row + 1
    way_back = "nothing was trained before them"
    if first > 1:
        way_back = "no state is saved, as configured"
        if saves_any(job):
            # The weights are those of then; so is the rate that a run which resumes there goes on with.
            job.schedule.step(-skips.in_a_row)
            save(job, first - 1, {})
            way_back = f"the state before them is in {folder_of(job.folder / CHECKPOINTS, first - 1)}"
    raise UserError(skips.message(first, step, way_back))


def train_step(job: Job, step: int, steps: Iterator[StepRows]) -> dict[str, float]:
    """Optimizer step number `step` (from 1): rows, forward and backward, finite check, update. Returns its metrics.

    Args:
        steps: gives the step's rows next.

    Raises:
        NotFinite: the loss or the gradient is not, and nothing was updated; on all ranks.
    """
    setup, began = job.setup, time.perf_counter()
    with job.mark("rows"):
        rows = next(steps)
    waited = time.perf_counter() - began
    for chunk in job.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    job.optimizer.zero_grad()
    references = job.references["train"]
    values = objective_pass(
        job.chunks, rows, setup.objective, references, setup.layout, forward_only=False,
        times=job.times, stop=job.stop,
    )  # fmt: skip
    values["lr"] = job.optimizer.param_groups[0]["lr"]
    before = None if job.sample is None else job.sample.values()
    with job.mark("optimizer"):
        _, norm, _ = job.optimizer.step()
    # With Transformer Engine's kernels a tensor on the device, in Megatron-core 0.19.
    values["grad_norm"] = float(norm)
    if job.sample is not None and before is not None:
        values["moved_fraction"] = job.sample.moved_since(before)
    job.schedule.step(1)
    seconds = time.perf_counter() - began
    return values | {
        "groups_per_second": rows.groups / seconds,
        "tokens_per_second": rows.tokens / seconds,
        "rows": len(rows.rows) * setup.layout.dp,
        "row_tokens": rows.longest_row,
        "fill": rows.fill,
        "split_groups": rows.split_groups,
        "seconds": seconds,
        "data_seconds": waited,
        **job.throughput.of_step(setup.train.steps[step - 1], seconds),
    }


def save(job: Job, step: int, metrics: dict[str, float]) -> None:
    """Write, or begin to write, the checkpoint of `step`, with the metrics of the validation there."""
    files = {
        "config.yaml": yaml.safe_dump(as_yaml(job.setup.config), sort_keys=False),
        IDENTITY_FILE: json.dumps(identity(job), indent=2),
        VALIDATION_FILE: json.dumps(metrics, indent=2),
    }
    complete_save(job, wait=True)
    job.writer.start(step, job.chunks, job.optimizer, job.schedule, files, job.setup.hf_folder)
    complete_save(job, wait=not job.setup.config.trainer.checkpoint.async_save)


def complete_save(job: Job, *, wait: bool) -> None:
    """See to the checkpoint that is being written, if there is one; all ranks call it.

    When it is complete: name it, have it exported, and remove those that are not to be kept.
    """
    path = job.writer.finish(wait=wait)
    if path is None or not job.is_main:
        return
    say(f"checkpoint in {path}")
    export_missing(job)
    thin_out(job)


def export_missing(job: Job) -> None:
    """Begin to export what has been saved and not exported: the newest, and those whose export was killed.

    One that another start of the run has begun, and that goes on, is made twice.
    """
    model = job.setup.config.model
    if not (model.export_at_save and job.is_main):
        return
    begun = job.exports.begun
    for path in all_checkpoints(job.folder / CHECKPOINTS).values():
        output = job.folder / "exports" / path.name
        if path not in begun and not output.exists():
            job.exports.start(path, output, EXPORT_DTYPES[model.export_dtype])


def thin_out(job: Job) -> None:
    """Remove the checkpoints that are not to be kept and that nobody reads; for rank 0."""
    model = job.setup.config.model
    in_use = [*job.exports.reading(), Path(model.restore_from_path), Path(model.reference_path)]
    checkpoints = all_checkpoints(job.folder / CHECKPOINTS)
    remove_superfluous(checkpoints, job.setup.config.trainer.checkpoint, in_use)


def finish(job: Job) -> None:
    """Export the Hugging Face folder; print the table and draw the picture."""
    config, layout = job.setup.config, job.setup.layout
    output = config.model.export_path
    target = job.folder / "hf" if output is None else Path(output).expanduser()
    if output != "":
        models = current_models(job.chunks)
        dtype = EXPORT_DTYPES[config.model.export_dtype]
        values = (
            partial(master_values, optimizer=job.optimizer) if dtype == torch.float32 else torch.Tensor.detach
        )
        export_hf(
            models, job.setup.architecture, layout,
            source=job.setup.hf_folder, output=target, dtype=dtype, values=values,
        )  # fmt: skip
    if (experiment := close(job)) is None:
        return
    history = experiment.history()
    plot_run(history, job.folder / "training.png")
    validations = [line for line in history if line["split"] == "validation"]
    if len(validations) > 1:
        groups = sum(len(step) for step in job.setup.validation.steps) if job.setup.validation else 0
        before_after(validations[0], validations[-1], f"validation, {groups} groups")
    if (line := job.times.summary()) is not None:
        say(line)
    say(f"metrics     {job.folder / 'metrics.jsonl'}")
    say(f"picture     {job.folder / 'training.png'}")
    if output != "":
        say(f"model       {target} (Hugging Face folder)")
