"""The job, top-down: prepare, reference log-probs, steps with validation and checkpoints, export, closing table."""

import json
import math
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core import tensor_parallel
from torch import Tensor

import mpo_megatron
from mpo_megatron.config import Config
from mpo_megatron.conversion.export import export_hf
from mpo_megatron.conversion.load import load_hf_weights
from mpo_megatron.errors import CheckpointError, UserError
from mpo_megatron.model.attention import choose_backend
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap, uses_transformer_engine
from mpo_megatron.runtime.parallel import raise_together, shutdown
from mpo_megatron.scheduling.rows import StepRows
from mpo_megatron.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from mpo_megatron.training.experiment import CHECKPOINTS, Experiment, start_experiment
from mpo_megatron.training.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from mpo_megatron.training.reference import cache_path, reference_logps, weights_fingerprint
from mpo_megatron.training.report import TrainingBar, before_after, plot_run, progress, say
from mpo_megatron.training.setup import Setup, Split, prepare
from mpo_megatron.training.step import objective_pass

IDENTITY_FILE = "run.json"


def train(config: Config) -> None:
    """Run the job that the configuration describes. Every rank calls it.

    Raises:
        UserError: configuration, data, machine or checkpoint are not as they must be.
    """
    try:
        setup = prepare(config)
        job = build_job(setup)
        start = resume(job)
        if start == 0:
            validate(job, 0)
        run_steps(job, start)
        finish(job)
    except (
        UserError
    ):  # on all ranks alike; after any other error, ending the groups could wait for ranks inside one
        shutdown()
        raise
    shutdown()


@dataclass
class Job:
    """A run with its model: what the steps need."""

    setup: Setup
    chunks: list[Any]
    optimizer: Any
    schedule: Any
    references: dict[str, Tensor]  # by split name, [responses of the data set]
    experiment: Experiment | None  # on rank 0
    folder: Path

    @property
    def total_steps(self) -> int:
        return len(self.setup.train.steps)

    @property
    def is_main(self) -> bool:
        return self.setup.layout.is_main

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        if self.experiment is not None:
            self.experiment.log(step, split, values)


def model_options(config: Config, dtype: torch.dtype) -> ModelOptions:
    """The part of the configuration that says how the model is built."""
    model = config.model
    return ModelOptions(
        dtype=dtype,
        sequence_parallel=config.sequence_parallel,
        transformer_impl=model.transformer_impl,
        attention_backend=model.attention_backend,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        head_chunk_size=model.head_chunk_size,
        recompute_granularity=model.activations_checkpoint_granularity,
        recompute_method=model.activations_checkpoint_method,
        recompute_num_layers=model.activations_checkpoint_num_layers,
    )


def build_job(setup: Setup) -> Job:
    """Build the model with the starting weights, compute the reference log-probs, make optimizer and experiment."""
    config, layout = setup.config, setup.layout
    experiment, error = None, None
    if layout.is_main:
        try:
            experiment = start_experiment(config)
        except UserError as caught:
            error = caught
    raise_together(error, layout)
    folder = [str(experiment.folder) if experiment else ""]
    dist.broadcast_object_list(folder, src=0)
    if layout.is_main:
        _introduce(setup, folder[0])

    tensor_parallel.model_parallel_cuda_manual_seed(config.trainer.seed)
    chunks = build_model(setup.architecture, layout, model_options(config, setup.dtype))
    error = None
    try:
        for chunk in chunks:
            load_hf_weights(unwrap(chunk), setup.architecture, layout, config.model.restore_from_path)
    except UserError as caught:
        error = caught
    raise_together(error, layout)
    chunks = wrap_data_parallel(chunks, config.model.optim.distributed)
    optimizer = build_optimizer(chunks, config.model.optim, config.trainer.gradient_clip_val, setup.dtype)
    schedule = build_schedule(optimizer, config.model.optim, len(setup.train.steps))
    splits = [setup.train] + ([setup.validation] if setup.validation else [])
    references = {split.name: _reference(split, chunks, setup) for split in splits}
    return Job(setup, chunks, optimizer, schedule, references, experiment, Path(folder[0]))


def _introduce(setup: Setup, folder: str) -> None:
    """The first lines of a run: what, on what, with which data, where the results go."""
    config, layout, architecture = setup.config, setup.layout, setup.architecture
    model = config.model
    te = uses_transformer_engine(model_options(config, setup.dtype), layout.device)
    backend = choose_backend(model.attention_backend, layout.device, setup.dtype)
    device = "CPU" if layout.device.type == "cpu" else torch.cuda.get_device_name(layout.device)
    steps, per_epoch = len(setup.train.steps), setup.steps_per_epoch
    lines = [
        f"mpo_megatron {mpo_megatron.__version__}, megatron-core {version('megatron-core')}, torch {torch.__version__}",
        f"model       {model.restore_from_path}: {architecture.num_parameters / 1e6:.0f}M parameters, "
        f"{architecture.num_layers} layers",
        f"runs on     {layout}, {device}, {config.precision if config.precision == 'bf16' else 'fp32'}, "
        f"{'Transformer Engine' if te else 'local'} layers, {backend} attention",
        f"objective   {model.mpo.objective}, beta {model.mpo.beta:g}, alpha {model.mpo.alpha:g}, "
        f"{model.mpo.weighting} weighting, learning rate {model.optim.lr:g}",
        f"training    {setup.train.dataset.report}",
    ]
    if setup.validation:
        lines.append(f"validation  {setup.validation.dataset.report}")
    split = setup.train.source.count_split()
    lines += [
        f"rows        at most {model.max_tokens_per_micro_batch} tokens; "
        + (f"{split} groups are larger and run in two passes" if split else "every group fits one"),
        f"steps       {steps} of {model.global_batch_size} groups ({steps / per_epoch:.2g} epochs)",
        f"results in  {folder}",
    ]
    for line in lines:
        say(line)


def _reference(split: Split, chunks: list[Any], setup: Setup) -> Tensor:
    """The split's reference log-probs over the rows of its first pass; see `reference`."""
    config, layout = setup.config, setup.layout
    steps = split.steps[: setup.steps_per_epoch] if split.name == "train" else split.steps
    backend = choose_backend(config.model.attention_backend, layout.device, setup.dtype)
    te = uses_transformer_engine(model_options(config, setup.dtype), layout.device)
    device = "cpu" if layout.device.type == "cpu" else torch.cuda.get_device_name(layout.device)
    key = {
        "weights": weights_fingerprint(config.model.restore_from_path),
        "data": split.dataset.fingerprint,
        "plan": [len(steps), config.model.global_batch_size, split.source.max_tokens, split.source.alignment,
                 config.model.pack.shared_prompt, config.trainer.seed if split.name == "train" else None],
        "arithmetic": [layout.sizes, device, str(setup.dtype), torch.get_num_threads(),
                       config.sequence_parallel, te, backend, config.model.head_chunk_size,
                       config.model.make_vocab_size_divisible_by, torch.__version__, version("megatron-core")],
    }  # fmt: skip
    path = cache_path(config.model.data.cache_dir, key)
    bar = progress(f"reference, {split.name}", "step", layout.is_main)
    return reference_logps(chunks, split.source, steps, layout, path, bar)


def resume(job: Job) -> int:
    """Load the newest checkpoint of a run that is to be resumed. Returns the steps that are done."""
    if not job.setup.config.exp_manager.get("resume_if_exists"):
        return 0
    path = latest_checkpoint(job.folder / CHECKPOINTS)
    if path is None:
        if job.experiment is not None:
            job.experiment.rewind(-1)  # a start that came to no checkpoint is started anew
        return 0
    _check_same_run(path, job)
    step = load_checkpoint(path, job.chunks, job.optimizer, job.schedule)
    if job.experiment is not None:
        job.experiment.rewind(step)
        say(f"resumed at step {step} from {path}")
    return step


def _identity(job: Job) -> dict[str, Any]:
    """What the position of a run, its count of steps, refers to."""
    config = job.setup.config
    return {
        "model.data.train": job.setup.train.dataset.fingerprint,
        "model.global_batch_size": config.model.global_batch_size,
        "trainer.seed": config.trainer.seed,
    }


def _check_same_run(path: Path, job: Job) -> None:
    saved = json.loads((path / IDENTITY_FILE).read_text(encoding="utf-8"))
    for key, value in _identity(job).items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{path} was saved with another {key} ({saved.get(key)}, now {value}), so its steps are not this "
                "run's; set it back, or start anew in another folder"
            )


def run_steps(job: Job, start: int) -> None:
    """Train from step `start` to the end, with validations and checkpoints in between."""
    trainer = job.setup.config.trainer
    val_every = trainer.val_check_interval
    if 0 < val_every < 1:
        val_every = max(1, round(val_every * job.setup.steps_per_epoch))
    bar = TrainingBar(job.total_steps, start, shown=job.is_main)
    for step in range(start + 1, job.total_steps + 1):
        values = train_step(job, step)
        bar.advance(values)
        last = step == job.total_steps
        if step % trainer.log_every_n_steps == 0 or last:
            job.log(step, "train", values)
        if last or (val_every and step % int(val_every) == 0):
            validate(job, step)
        if (last and trainer.save_at_end) or (trainer.save_interval and step % trainer.save_interval == 0):
            save(job, step)
    bar.close()


def train_step(job: Job, step: int) -> dict[str, float]:
    """Optimizer step number `step` (from 1): rows, forward and backward, finite check, update. Returns its metrics."""
    setup, began = job.setup, time.perf_counter()
    rows = setup.train.source.step(setup.train.steps[step - 1])
    for chunk in job.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    job.optimizer.zero_grad()
    references = job.references["train"]
    values = objective_pass(job.chunks, rows, setup.objective, references, setup.layout, forward_only=False)
    _check_finite("loss", values["loss"], step, setup, rows)
    values["lr"] = job.optimizer.param_groups[0]["lr"]
    _, values["grad_norm"], _ = job.optimizer.step()
    _check_finite("gradient norm", values["grad_norm"], step, setup, rows)
    job.schedule.step(1)
    seconds = time.perf_counter() - began
    return values | {
        "groups_per_second": rows.groups / seconds,
        "tokens_per_second": rows.tokens / seconds,
        "rows": len(rows.rows) * setup.layout.dp,
        "row_tokens": rows.longest_row,
        "fill": rows.fill,
        "split_groups": rows.split.num_groups if rows.split else 0,
        "seconds": seconds,
    }


def _check_finite(name: str, value: float, step: int, setup: Setup, rows: StepRows) -> None:
    if not math.isfinite(value):
        ids = [setup.train.dataset.group(int(i)).id for i in setup.train.steps[step - 1]]
        raise UserError(
            f"the {name} of step {step} is {value}; the last checkpoint is whole. Look at the groups of this step "
            f"({', '.join(ids[:16])}{', ...' if len(ids) > 16 else ''}), or lower model.optim.lr"
        )


def validate(job: Job, step: int) -> None:
    """Log the validation split's metrics after `step` optimizer steps."""
    split, layout = job.setup.validation, job.setup.layout
    if split is None:
        return
    references = job.references["validation"]
    for chunk in job.chunks:
        chunk.eval()
    sums: dict[str, float] = {}
    groups = 0
    for positions in progress("validation", "step", layout.is_main)(split.steps):
        rows = split.source.step(positions)
        values = objective_pass(job.chunks, rows, job.setup.objective, references, layout, forward_only=True)
        sums = {name: sums.get(name, 0.0) + value * rows.groups for name, value in values.items()}
        groups += rows.groups
    job.log(step, "validation", {name: value / groups for name, value in sums.items()})


def save(job: Job, step: int) -> None:
    """Write the checkpoint of `step`."""
    source = Path(job.setup.config.model.restore_from_path)
    files = {
        "config.yaml": yaml.safe_dump(asdict(job.setup.config), sort_keys=False),
        IDENTITY_FILE: json.dumps(_identity(job), indent=2),
    }
    folder = job.folder / CHECKPOINTS
    path = save_checkpoint(
        folder, step, job.chunks, job.optimizer, job.schedule, job.setup.layout, files, source
    )
    if job.is_main:
        say(f"checkpoint in {path}")


def finish(job: Job) -> None:
    """Export the Hugging Face folder; print the table and draw the picture."""
    config, layout = job.setup.config, job.setup.layout
    output = config.model.export_path
    target = job.folder / "hf" if output is None else Path(output).expanduser()
    if output != "":
        models = [unwrap(chunk) for chunk in job.chunks]
        export_hf(
            models, job.setup.architecture, layout, source=config.model.restore_from_path, output=target
        )
    if job.experiment is None:
        return
    job.experiment.close()
    history = job.experiment.history()
    plot_run(history, job.folder / "training.png")
    validations = [line for line in history if line["split"] == "validation"]
    if len(validations) > 1:
        groups = sum(len(step) for step in job.setup.validation.steps) if job.setup.validation else 0
        before_after(validations[0], validations[-1], f"validation, {groups} groups")
    say(f"metrics     {job.folder / 'metrics.jsonl'}")
    say(f"picture     {job.folder / 'training.png'}")
    if output != "":
        say(f"model       {target} (Hugging Face folder)")
