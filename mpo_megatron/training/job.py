"""A job before its first step: experiment, model, optimizer, reference log-probs."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

import mpo_megatron
from mpo_megatron.conversion.hf_folder import is_checkpoint
from mpo_megatron.conversion.load import load_hf_weights
from mpo_megatron.conversion.restore import load_megatron_weights
from mpo_megatron.model.fp8 import Fp8
from mpo_megatron.model.provider import build_model, unwrap
from mpo_megatron.runtime.parallel import raising_together
from mpo_megatron.runtime.publish import check_writable
from mpo_megatron.training.checkpoint_writer import CheckpointWriter
from mpo_megatron.training.data_parallel import wrap_data_parallel
from mpo_megatron.training.experiment import CHECKPOINTS, Experiment, start_experiment
from mpo_megatron.training.exports import BackgroundExports
from mpo_megatron.training.kernels import costs, kernels
from mpo_megatron.training.masters import place_masters
from mpo_megatron.training.movement import WeightSample
from mpo_megatron.training.nodes import check_shared
from mpo_megatron.training.optimizer import build_optimizer, build_schedule
from mpo_megatron.training.optimizer_state import BUCKETS, WHOLE
from mpo_megatron.training.rank_times import RankTimes
from mpo_megatron.training.reference import reference_logps
from mpo_megatron.training.reference_cache import reference_cache
from mpo_megatron.training.report import progress, say
from mpo_megatron.training.setup import Setup, Split
from mpo_megatron.training.stop import Stop
from mpo_megatron.training.throughput import Throughput, expectation, measure


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
    sample: WeightSample | None  # of bf16 weights
    throughput: Throughput
    writer: CheckpointWriter
    times: RankTimes
    exports: BackgroundExports = field(default_factory=BackgroundExports)  # used on rank 0
    stop: Stop = field(default_factory=Stop)
    # Names a part of a step for a profiler; see `profiling`.
    mark: Callable[[str], AbstractContextManager[Any]] = nullcontext

    @property
    def total_steps(self) -> int:
        return len(self.setup.train.steps)

    @property
    def is_main(self) -> bool:
        return self.setup.layout.is_main

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        if self.experiment is not None:
            self.experiment.log(step, split, values)


def build_job(setup: Setup) -> Job:
    """Open the experiment, build the model with the starting weights and its optimizer, compute the reference.

    Raises:
        UserError: experiment folder or weights are not as they must be; raised on all ranks alike.
    """
    config, layout, options = setup.config, setup.layout, setup.model_options
    experiment, folder = _open_experiment(setup)
    throughput = measure(setup)
    if layout.is_main:
        _introduce(setup, folder, throughput)
        _copy_faults(setup, folder)

    tensor_parallel.model_parallel_cuda_manual_seed(config.trainer.seed)
    chunks = build_model(setup.architecture, layout, options)
    _load_weights(chunks, setup, config.model.restore_from_path)
    chunks = wrap_data_parallel(chunks, setup.data_parallel)
    optimizer = build_optimizer(chunks, config.model.optim, config.trainer.gradient_clip_val, options.dtype)
    schedule = build_schedule(optimizer, config.model.optim, len(setup.train.steps))
    splits = [setup.train] + ([setup.validation] if setup.validation else [])
    with _reference_weights(chunks, setup):
        references = {split.name: _reference(split, chunks, setup) for split in splits}
    times = RankTimes(chunks, layout)
    sample = None
    if options.dtype == torch.bfloat16:
        sample = WeightSample([unwrap(chunk) for chunk in chunks], optimizer)
    rule = config.trainer.checkpoint
    form = WHOLE if rule.dist_ckpt_optim_fully_reshardable else BUCKETS
    writer = CheckpointWriter(folder / CHECKPOINTS, layout, form, asynchronous=rule.async_save)
    return Job(
        setup, chunks, optimizer, schedule, references, experiment, folder, sample, throughput, writer, times
    )


def _load_weights(chunks: list[Any], setup: Setup, folder: str) -> None:
    """Fill the model from a Hugging Face folder or a distributed checkpoint."""
    models = [unwrap(chunk) for chunk in chunks]
    if is_checkpoint(folder):
        load_megatron_weights(models, setup.layout, folder)
        return
    bar = progress("weights", "tensor", setup.layout.is_main)
    load_hf_weights(models, setup.architecture, setup.layout, folder, bar)


@contextmanager
def _reference_weights(chunks: list[Any], setup: Setup) -> Iterator[None]:
    """A block in which the model has the reference's weights; masters keep the starting ones."""
    model = setup.config.model
    if model.mpo.reference_from_path is None:
        yield
        return
    _load_weights(chunks, setup, model.mpo.reference_from_path)
    yield
    _load_weights(chunks, setup, model.restore_from_path)


def _open_experiment(setup: Setup) -> tuple[Experiment | None, Path]:
    """The experiment, on rank 0, and its folder, on all ranks."""
    experiment, trainer = None, setup.config.trainer
    with raising_together(setup.layout):
        if setup.layout.is_main:
            if setup.config.model.export_path:
                check_writable(Path(setup.config.model.export_path).expanduser())
            experiment = start_experiment(setup.config)
    # The working directory may be another on another node.
    found = [str(experiment.folder.absolute()) if experiment else ""]
    dist.broadcast_object_list(found, src=0, group=setup.layout.control)
    folder = Path(found[0])
    if trainer.save_at_end or trainer.save_interval or setup.config.exp_manager.get("resume_if_exists"):
        check_shared(folder, setup.layout)
    return experiment, folder


def _introduce(setup: Setup, folder: Path, throughput: Throughput) -> None:
    """The first lines of a run: what, on what, with which data, where the results go."""
    config, layout, architecture = setup.config, setup.layout, setup.architecture
    model = config.model
    layers = "Transformer Engine" if setup.model_options.transformer_engine else "local"
    device = "CPU" if layout.device.type == "cpu" else torch.cuda.get_device_name(layout.device)
    steps, per_epoch = len(setup.train.steps), setup.steps_per_epoch
    settings = [f"{name} {value}" for name, value in setup.hyper_parameters.items()]
    if model.mpo.sft_weight:
        settings.append(f"SFT on the best response by {model.mpo.sft_weight:g}")
    if not setup.entry.needs_reference:
        settings.append("no reference")
    elif model.mpo.reference_from_path is not None:
        settings.append(f"reference {model.mpo.reference_from_path}")
    lines = [
        f"mpo_megatron {mpo_megatron.__version__}, megatron-core {version('megatron-core')}, torch {torch.__version__}",
        f"model       {model.restore_from_path}: {architecture.num_parameters / 1e6:.0f}M parameters, "
        f"{architecture.num_layers} layers",
        f"runs on     {layout}, {device}, {config.precision if config.precision == 'bf16' else 'fp32'}, "
        f"{layers} layers, {setup.model_options.attention_backend} attention",
        *_fp8_lines(setup.model_options.fp8),
        *kernels(setup.model_options, layout, architecture.num_heads, model.data.max_length),
        *costs(config.trainer.accelerator, layout),
        ", ".join([f"objective   {setup.entry.name}", *settings, f"learning rate {model.optim.lr:g}"]),
        f"training    {setup.train.dataset.report}",
    ]
    if setup.validation:
        lines.append(f"validation  {setup.validation.dataset.report}")
    split = setup.train.source.count_split()
    lines += [
        f"rows        at most {model.max_tokens_per_micro_batch} tokens; "
        + (f"{split} groups are larger and run in two passes" if split else "every group fits one")
        + ("; all run twice, for the whole global batch" if setup.entry.needs_global_batch else ""),
        f"steps       {steps} of {model.global_batch_size} groups ({steps / per_epoch:.2g} epochs)",
        *expectation(setup, throughput),
        f"results in  {folder}",
    ]
    for line in lines:
        say(line)


def _copy_faults(setup: Setup, folder: Path) -> None:
    """What records of the data were left out for, into the run's folder: the cache may go."""
    for split in (setup.train, setup.validation):
        if split is not None and split.dataset.skipped.stat().st_size:
            target = folder / f"skipped_{split.name}.jsonl"
            shutil.copyfile(split.dataset.skipped, target)
            say(f"left out    of {split.name}, each with its reason: {target}")


def _fp8_lines(fp8: Fp8 | None) -> list[str]:
    if fp8 is None:
        return []
    lines = [f"fp8         {fp8}"]
    if not fp8.repeats_itself:
        lines.append(
            "            margins at step 0 need not be exactly 0: delayed scales change from row to row of a training "
            "step, and the reference pass had the first ones; to resume needs "
            "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1; model.fp8_recipe=tensorwise has no past"
        )
    return lines


def start_masters(job: Job) -> None:
    """Put the float32 masters of bf16 weights where the configuration wants them: before the first step of a run.

    A run that resumes has them in its checkpoint. Every rank calls it.

    Raises:
        CheckpointError: the starting model cannot be read.
    """
    if job.sample is None:
        return
    setup, optim = job.setup, job.setup.config.model.optim
    missed = 1 - job.sample.shown(optim.lr)
    at_once = f"an update of {optim.lr:g} would not show in {missed:.1%} of them at once"
    line = f"masters     at the bf16 weights, where {at_once}; model.optim.master_weights=auto mends that"
    if optim.master_weights == "auto":
        models = [unwrap(chunk) for chunk in job.chunks]
        source = setup.config.model.restore_from_path
        seed = setup.config.trainer.seed
        place_masters(models, job.optimizer, setup.architecture, setup.layout, source, seed)
        line = f"masters     within the rounding of the bf16 weights; at the weights, {at_once}"
    if job.is_main:
        say(line)


def _reference(split: Split, chunks: list[Any], setup: Setup) -> Tensor:
    """The split's reference log-probs over the rows of its first pass; see `reference`. NaN where there is none."""
    if not setup.entry.needs_reference:
        size = int(split.dataset.response_offsets[-1])
        return torch.full((size,), torch.nan, device=setup.layout.device)
    steps = split.steps[: setup.steps_per_epoch] if split.name == "train" else split.steps
    cache = reference_cache(split, steps, setup)
    bar = progress(f"reference, {split.name}", "step", setup.layout.is_main)
    return reference_logps(chunks, split.source, steps, setup.layout, cache, bar)
