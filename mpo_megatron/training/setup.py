"""Everything a run needs before its first step, made from the configuration in order: cheap checks first."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mpo_megatron import objectives
from mpo_megatron.config import Config, OptimConfig
from mpo_megatron.conversion.hf_folder import WeightReader, is_checkpoint, model_folder
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.data import GroupDataset
from mpo_megatron.data.readers import content_digest
from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Architecture, check_layout, read_architecture
from mpo_megatron.model.attention import choose_backend
from mpo_megatron.model.fp8 import Fp8, Machine, check_fp8, check_machine, row_alignment
from mpo_megatron.model.head import choose_head
from mpo_megatron.model.provider import ModelOptions, no_transformer_engine, uses_transformer_engine
from mpo_megatron.objectives.registry import Objective
from mpo_megatron.runtime import capabilities
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.meeting import starting_together
from mpo_megatron.runtime.parallel import ParallelLayout, initialize, raising_together
from mpo_megatron.scheduling.order import in_order, step_groups, steps_per_epoch
from mpo_megatron.scheduling.plan import Pipeline
from mpo_megatron.scheduling.rows import RowSource
from mpo_megatron.training.data import open_data, selection_of, validation_selection
from mpo_megatron.training.data_parallel import DataParallel
from mpo_megatron.training.nodes import check_same_job, check_same_model
from mpo_megatron.training.profiling import check_profile

DTYPES = {"bf16": torch.bfloat16, "32": torch.float32}
EXPORT_DTYPES = {None: None, "bf16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Split:
    """One data set of the run: its rows, and the groups of each of its steps as positions in the data set."""

    name: str
    dataset: GroupDataset
    source: RowSource
    steps: list[np.ndarray]


@dataclass(frozen=True)
class Setup:
    """A checked run whose model is not built yet."""

    config: Config
    hf_folder: Path  # of the starting model: config, tokenizer, chat template
    architecture: Architecture
    entry: objectives.Entry  # of the objective in the table of all
    hyper_parameters: dict[str, Any]  # all of the objective's
    objective: Objective  # with these bound
    layout: ParallelLayout
    model_options: ModelOptions
    data_parallel: DataParallel
    train: Split
    validation: Split | None
    steps_per_epoch: int


def prepare(config: Config) -> Setup:
    """Check the configuration against model and machine, start the process groups, and open the data.

    Raises:
        UserError: something must change; raised on all ranks alike.
    """
    model = config.model
    with starting_together():
        entry, hyper_parameters = settle_objective(config)
        hf_folder = _model_folder("model.restore_from_path", model.restore_from_path)
        architecture = read_architecture(hf_folder)
        _check_reference(config, architecture)
        check_layout(
            architecture,
            tp=model.tensor_model_parallel_size,
            pp=model.pipeline_model_parallel_size,
            vpp=model.virtual_pipeline_model_parallel_size or 1,
            first_stage=model.num_layers_in_first_pipeline_stage,
            last_stage=model.num_layers_in_last_pipeline_stage,
            max_length=model.data.max_length,
            ep=model.expert_model_parallel_size,
            sequence_parallel=config.sequence_parallel,
        )
        check_export_path(config)
        selection = selection_of(config, entry)
        device = choose_device(config.trainer.accelerator)
        options = model_options(config, device)
        if options.fp8 is not None:
            check_fp8(options.fp8, architecture, model.tensor_model_parallel_size)
    layout = initialize(
        device,
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        vpp=model.virtual_pipeline_model_parallel_size or 1,
        cp=model.context_parallel_size,
        ep=model.expert_model_parallel_size,
        timeout_minutes=config.trainer.distributed_timeout_minutes,
    )
    check_same_job(config, layout)
    _check_models(config, layout)
    _check_devices(config, layout)

    data = _on_one_rank_per_node(partial(open_data, config, selection), model.data.train, layout)
    rows = partial(
        _rows, config=config, architecture=architecture, layout=layout, entry=entry, fp8=options.fp8
    )
    train = _train_split(config, data, rows(data))
    check_profile(config, layout, len(train.steps))
    if options.fp8 is not None and not options.fp8.repeats_itself:
        _check_one_pass(options.fp8, train.source, entry)
    validation = None
    if model.data.validation:
        held_out = partial(open_data, config, validation_selection(config, selection))
        data = _on_one_rank_per_node(held_out, model.data.validation, layout)
        steps = list(in_order(len(data), model.global_batch_size))[: config.trainer.limit_val_batches]
        validation = Split("validation", data, rows(data), steps)
    return Setup(
        config=config,
        hf_folder=hf_folder,
        architecture=architecture,
        entry=entry,
        hyper_parameters=hyper_parameters,
        objective=objectives.bind(entry, hyper_parameters, model.mpo.sft_weight),
        layout=layout,
        model_options=options,
        data_parallel=data_parallel(config.model.optim, layout),
        train=train,
        validation=validation,
        steps_per_epoch=steps_per_epoch(len(train.dataset), model.global_batch_size),
    )


def _check_models(config: Config, layout: ParallelLayout) -> None:
    """The same files of all models on all nodes, and whole: broken ones are found before the data are tokenised."""
    models = {"model.restore_from_path": config.model.restore_from_path}
    if config.model.mpo.reference_from_path is not None:
        models["model.mpo.reference_from_path"] = config.model.mpo.reference_from_path
    for key, path in models.items():
        check_same_model(key, path, layout)
    with raising_together(layout):
        if layout.is_main:
            for path in models.values():
                CheckpointReader(path) if is_checkpoint(path) else WeightReader(path)


def _train_split(config: Config, data: GroupDataset, source: RowSource) -> Split:
    """The training data in the order of their steps, as many as the configuration has."""
    batch, trainer = config.model.global_batch_size, config.trainer
    total = trainer.max_steps
    if total == -1:
        total = steps_per_epoch(len(data), batch) * trainer.max_epochs
    steps = [step_groups(step, len(data), batch, trainer.seed) for step in range(total)]
    return Split("train", data, source, steps)


def _model_folder(key: str, path: str) -> Path:
    try:
        return model_folder(path)
    except ConfigError as error:
        raise ConfigError(f"{key}={path}: {error}") from None


def _check_reference(config: Config, architecture: Architecture) -> None:
    """Raise ConfigError unless a reference of its own, where one is given, has the trained model's sizes."""
    path = config.model.mpo.reference_from_path
    if path is None:
        return
    theirs = read_architecture(_model_folder("model.mpo.reference_from_path", path))
    different = [f.name for f in fields(theirs) if getattr(theirs, f.name) != getattr(architecture, f.name)]
    if different:
        name = different[0]
        raise ConfigError(
            f"model.mpo.reference_from_path={path} is a model of {name}={getattr(theirs, name)}, and the trained one "
            f"has {name}={getattr(architecture, name)}; give a model of the same sizes"
        )


def settle_objective(config: Config) -> tuple[objectives.Entry, dict[str, Any]]:
    """The objective, and all of its hyper-parameters.

    Raises:
        ConfigError: keys of `model.mpo` that do not go with it.
    """
    mpo = config.model.mpo
    entry = objectives.get(mpo.objective)
    values = objectives.settle(entry, mpo.hyper_parameters, [f.name for f in fields(mpo)])
    if mpo.sft_weight and entry.name == "sft":
        raise ConfigError(
            f"model.mpo.sft_weight={mpo.sft_weight:g} adds SFT to another objective and model.mpo.objective=sft is "
            "SFT already; remove it, or choose another objective"
        )
    if mpo.reference_from_path is not None and not entry.needs_reference:
        raise ConfigError(
            f"model.mpo.reference_from_path={mpo.reference_from_path}: the objective {entry.name} reads no reference; "
            "remove it"
        )
    if mpo.reference == "none" and entry.needs_reference:
        free = [name for name in objectives.names() if not objectives.get(name).needs_reference]
        raise ConfigError(
            f"model.mpo.reference=none: the objective {entry.name} compares with a reference; remove it, or choose "
            f"one that needs none: {', '.join(free)}"
        )
    if mpo.reference == "cached" and not entry.needs_reference:
        raise ConfigError(
            f"model.mpo.reference=cached: the objective {entry.name} reads no reference; remove it, or set none"
        )
    return entry, values


def model_options(config: Config, device: torch.device) -> ModelOptions:
    """How the configuration says the model is built, with what it leaves to the machine decided here, once.

    Raises:
        ConfigError: the layers, the attention or the head that were asked for cannot run on this machine.
    """
    model, dtype = config.model, DTYPES[config.precision]
    fp8 = None
    if model.fp8 is not None:
        first, last = model.num_layers_at_start_in_bf16, model.num_layers_at_end_in_bf16
        fp8 = Fp8(model.fp8, model.fp8_recipe, first, last)
        problem = "model.transformer_impl=local" if model.transformer_impl == "local" else None
        problem = problem or no_transformer_engine(device, dtype)
        if problem is not None:
            raise ConfigError(
                f"model.fp8={model.fp8} is of Transformer Engine's layers: {problem}; mend that, or remove model.fp8"
            )
        cuda = capabilities.version_numbers(torch.version.cuda or "0.0")
        library = capabilities.transformer_engine().version
        check_machine(fp8, Machine(torch.cuda.get_device_capability(device), cuda, library))
    return ModelOptions(
        fp8=fp8,
        dtype=dtype,
        sequence_parallel=config.sequence_parallel,
        transformer_engine=uses_transformer_engine(model.transformer_impl, device, dtype),
        attention_backend=choose_backend(model.attention_backend, device, dtype),
        head_backend=choose_head(model.head_backend, device, dtype),
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        head_chunk_size=model.head_chunk_size,
        recompute_granularity=model.activations_checkpoint_granularity,
        recompute_method=model.activations_checkpoint_method,
        recompute_num_layers=model.activations_checkpoint_num_layers,
        num_layers_in_first_pipeline_stage=model.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=model.num_layers_in_last_pipeline_stage,
    )


def data_parallel(optim: OptimConfig, layout: ParallelLayout) -> DataParallel:
    """How the configuration says the replicas work together."""
    return DataParallel(optim.distributed, *optim.overlap(layout.device.type == "cuda"))


def check_export_path(config: Config) -> None:
    """Check before training that the export will not take the place of anything but an older export.

    Raises:
        ConfigError: the folder is the starting model's, the reference's or above one, or holds files but no model.
    """
    if not config.model.export_path:
        return
    target = Path(config.model.export_path).expanduser().resolve()
    for key, path in (
        ("model.restore_from_path", config.model.restore_from_path),
        ("model.mpo.reference_from_path", config.model.reference_path),
    ):
        source = Path(path).expanduser().resolve()
        if target == source or target in source.parents:
            raise ConfigError(
                f"model.export_path={config.model.export_path} would replace {key}={source}; choose another folder"
            )
    if target.exists() and (
        not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file())
    ):
        raise ConfigError(
            f"model.export_path={config.model.export_path} is there already and is not a model's folder; "
            "the export would replace it, so choose another, or empty it"
        )


def _check_devices(config: Config, layout: ParallelLayout) -> None:
    """`trainer.devices`, where given, is a check: torchrun decides how many ranks there are."""
    trainer = config.trainer
    if trainer.devices is not None and trainer.devices * trainer.num_nodes != layout.world_size:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices} is not the "
            f"{layout.world_size} ranks that torchrun started; make --nnodes and --nproc-per-node agree with them, "
            "or remove trainer.devices"
        )


def _on_one_rank_per_node(
    build: Callable[[str], GroupDataset], path: str, layout: ParallelLayout
) -> GroupDataset:
    """Call `build` on each node's first rank, then on the others, which find its cache. Its errors reach all ranks."""
    with raising_together(layout):
        if layout.local_rank == 0:
            build(path)
    with raising_together(layout):
        data = build(path)
    if not _same(data.fingerprint, layout):
        if not _same(content_digest(path), layout):
            raise ConfigError(
                f"{path} is not the same on all nodes; copy it from one place, or put it on storage that all nodes "
                "share"
            )
        raise ConfigError(
            "the nodes tokenised the data differently, although the files are the same: a chat template that prints "
            "today's date does that; put model.data.cache_dir on storage that all nodes share"
        )
    return data


def _same(value: str, layout: ParallelLayout) -> bool:
    """Whether all ranks have the same; all call it."""
    values: list[Any] = [None] * layout.world_size
    dist.all_gather_object(values, value, group=layout.control)
    return len(set(values)) == 1


def _check_one_pass(fp8: Fp8, rows: RowSource, entry: objectives.Entry) -> None:
    """Two passes over a row must give the same log-probs, or the weights of the second are of another loss."""
    split = rows.count_split()
    if split or entry.needs_global_batch:
        reason = (
            f"the objective {entry.name} sees the whole global batch at once"
            if entry.needs_global_batch
            else f"{split} groups are larger than a row"
        )
        raise ConfigError(
            f"model.fp8_recipe={fp8.recipe} gives a row other numbers each time it runs, and {reason}, so rows run "
            "twice; set model.fp8_recipe=tensorwise"
            + ("" if entry.needs_global_batch else ", or raise model.max_tokens_per_micro_batch")
        )


def _rows(
    data: GroupDataset,
    config: Config,
    architecture: Architecture,
    layout: ParallelLayout,
    entry: objectives.Entry,
    fp8: Fp8 | None,
) -> RowSource:
    return RowSource(
        data,
        max_tokens=config.model.max_tokens_per_micro_batch,
        alignment=row_alignment(fp8, layout.tp, layout.device, config.model.pack.pad_to_multiple_of)
        * layout.cp,
        shared_prompt=config.model.pack.shared_prompt,
        global_batch=entry.needs_global_batch,
        cost=architecture.cost_model,
        data_parallel=(layout.dp, layout.dp_rank),
        context=(layout.cp, layout.cp_rank),
        pipeline=Pipeline(layout.pp, layout.vpp),
        device=layout.device,
        prefetch=config.model.data.prefetch_factor,
    )
