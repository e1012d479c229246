"""Which values the schema's keys can have, alone and together: whatever needs no model and no data to be known.

Each message has the key, its value, the rule and the fix.
"""

from collections.abc import Collection
from dataclasses import fields
from operator import attrgetter
from typing import Any

from mpo_megatron.config.schema import KEPT_FAULTS, MONITORS, Config, FaultConfig, ModelConfig, OptimConfig
from mpo_megatron.errors import ConfigError
from mpo_megatron.finite import is_finite

# Keys with a choice of values. One whose default is null may be null.
CHOICES: dict[str, Collection[str]] = {
    "trainer.accelerator": ("auto", "gpu", "cpu"),
    "trainer.checkpoint.monitor": MONITORS,
    "trainer.checkpoint.mode": ("min", "max"),
    "model.transformer_impl": ("auto", "transformer_engine", "local"),
    "model.attention_backend": ("auto", "varlen", "te", "sdpa"),
    "model.head_backend": ("eager", "triton", "auto"),
    "model.export_dtype": ("bf16", "float32"),
    "model.fp8": ("hybrid", "e4m3"),
    "model.fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "model.activations_checkpoint_granularity": ("selective", "full"),
    "model.mpo.reference": ("cached", "none"),
    "model.data.truncation": ("error", "skip", "left"),
    "model.data.validate_on": ("selected", "all"),
    "model.optim.master_weights": ("auto", "rounded"),
    "model.optim.sched.name": ("CosineAnnealing", "Linear", "Constant"),
    **{
        f"model.data.faults.{fault.name}": ("error", "skip", "keep")
        if fault.name in KEPT_FAULTS
        else ("error", "skip")
        for fault in fields(FaultConfig)
    },
}
# Keys and the least that they can be; null where that is the default.
LEAST: dict[str, float] = {
    **dict.fromkeys(
        (
            "trainer.num_nodes",
            "trainer.devices",
            "trainer.max_epochs",
            "trainer.log_every_n_steps",
            "trainer.distributed_timeout_minutes",
            "trainer.limit_val_batches",
            "trainer.max_skipped_steps",
            "model.tensor_model_parallel_size",
            "model.pipeline_model_parallel_size",
            "model.virtual_pipeline_model_parallel_size",
            "model.num_layers_in_first_pipeline_stage",
            "model.num_layers_in_last_pipeline_stage",
            "model.context_parallel_size",
            "model.expert_model_parallel_size",
            "model.global_batch_size",
            "model.max_tokens_per_micro_batch",
            "model.make_vocab_size_divisible_by",
            "model.head_chunk_size",
            "model.pack.pad_to_multiple_of",
            "model.data.max_prompt_length",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "trainer.val_check_interval",
            "trainer.save_interval",
            "trainer.gradient_clip_val",
            "trainer.watch_window",
            "trainer.heartbeat_timeout_minutes",
            "model.num_layers_at_start_in_bf16",
            "model.num_layers_at_end_in_bf16",
            "model.mpo.sft_weight",
            "model.optim.weight_decay",
            "model.optim.sched.min_lr",
            "model.optim.sched.warmup_steps",
            "model.data.prefetch_factor",
        ),
        0,
    ),
}
PATHS = (
    "model.restore_from_path",
    "model.export_path",
    "model.mpo.reference_from_path",
    "model.data.train",
    "model.data.validation",
    "model.data.cache_dir",
)
_LONGEST_NAME = 255  # bytes, of a file on any usual file system
POSITIVE = ("model.optim.lr", "model.optim.eps")


def check(config: Config) -> None:
    """The rules on single values, and then those between them.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _one_of("trainer.precision", config.precision, ("bf16", "32"))
    for key, allowed in CHOICES.items():
        value = attrgetter(key)(config)
        if value is not None:
            _one_of(key, value, allowed)
    for key in PATHS:
        value = attrgetter(key)(config)
        if any(len(name.encode(errors="replace")) > _LONGEST_NAME for name in (value or "").split("/")):
            raise ConfigError(
                f"{key}={value} has a name of more than {_LONGEST_NAME} bytes, which no file can have"
            )
    for key, least in LEAST.items():
        value = attrgetter(key)(config)
        if value is not None:
            _at_least(key, value, least)
    for key in POSITIVE:
        value = attrgetter(key)(config)
        if not (is_finite(value) and value > 0):
            raise ConfigError(f"{key}={value} must be positive")

    _check_steps(config)
    _check_checkpoints(config)
    _check_layout(config.model)
    _check_recomputation(config.model)
    _check_fp8(config)
    _check_optim(config.model.optim)
    _check_lengths(config.model)
    _check_profile(config.model)


def _check_steps(config: Config) -> None:
    trainer = config.trainer
    if trainer.max_steps != -1:
        _at_least("trainer.max_steps", trainer.max_steps, 1)
    if trainer.val_check_interval >= 1 and trainer.val_check_interval != int(trainer.val_check_interval):
        raise ConfigError(
            f"trainer.val_check_interval={trainer.val_check_interval} must be a whole number of steps, or below 1"
        )


def _check_checkpoints(config: Config) -> None:
    trainer = config.trainer
    rule = trainer.checkpoint
    for name in ("save_top_k", "most_recent_k"):
        if getattr(rule, name) != -1:
            _at_least(f"trainer.checkpoint.{name}", getattr(rule, name), 1)
    if rule.save_top_k != -1 and not config.model.data.validation:
        raise ConfigError(
            f"trainer.checkpoint.save_top_k={rule.save_top_k} keeps the best by {rule.monitor} in validation, and "
            "model.data.validation is null; give it, or keep the newest with trainer.checkpoint.most_recent_k"
        )
    if config.exp_manager.get("checkpoint_callback_params"):
        raise ConfigError(
            "exp_manager.checkpoint_callback_params is of NeMo's callback, which this job does not use; set "
            "trainer.save_interval, and trainer.checkpoint.save_top_k, .monitor and .mode"
        )
    if config.model.export_at_save and not trainer.save_interval and not trainer.save_at_end:
        raise ConfigError(
            "model.export_at_save=true exports every checkpoint and there will be none; set trainer.save_interval, "
            "or remove export_at_save"
        )


def _check_layout(model: ModelConfig) -> None:
    virtual = model.virtual_pipeline_model_parallel_size
    if virtual is not None and virtual > 1 and model.pipeline_model_parallel_size == 1:
        raise ConfigError(
            f"model.virtual_pipeline_model_parallel_size={virtual} interleaves the stages of a pipeline and needs "
            "pipeline_model_parallel_size > 1; raise it or remove virtual_pipeline_model_parallel_size"
        )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        layers = getattr(model, name)
        if layers is not None and model.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"model.{name}={layers} is for one stage of a pipeline and needs "
                f"pipeline_model_parallel_size > 1; raise it or remove {name}"
            )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise ConfigError(
            "model.sequence_parallel=true needs tensor_model_parallel_size > 1; "
            "set it to false or raise tensor_model_parallel_size"
        )


def _check_recomputation(model: ModelConfig) -> None:
    if model.activations_checkpoint_granularity == "full":
        _one_of(
            "model.activations_checkpoint_method", model.activations_checkpoint_method, ("uniform", "block")
        )
        _at_least("model.activations_checkpoint_num_layers", model.activations_checkpoint_num_layers or 0, 1)


def _check_fp8(config: Config) -> None:
    model = config.model
    names = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    kept = [name for name in names if getattr(model, name)]
    if model.fp8 is None:
        if kept:
            raise ConfigError(
                f"model.{kept[0]} says which layers FP8 leaves alone, and model.fp8 is off; remove it"
            )
        return
    if config.precision != "bf16":
        raise ConfigError(
            f"model.fp8={model.fp8} casts the operands of a bf16 model; set trainer.precision=bf16, or remove it"
        )
    if kept and model.fp8_recipe == "delayed":
        raise ConfigError(
            f"model.{kept[0]} goes with any recipe but delayed, whose scales are found for all layers together; "
            "set model.fp8_recipe=tensorwise, or remove it"
        )


def _check_optim(optim: OptimConfig) -> None:
    if optim.sched.min_lr > optim.lr:
        raise ConfigError(
            f"model.optim.sched.min_lr={optim.sched.min_lr} is above model.optim.lr={optim.lr}; lower it"
        )
    if not 0 <= optim.sched.warmup_ratio <= 1:
        raise ConfigError(
            f"model.optim.sched.warmup_ratio={optim.sched.warmup_ratio} must be between 0 and 1"
        )
    if not all(0 <= b < 1 for b in optim.betas):
        raise ConfigError(f"model.optim.betas={list(optim.betas)} must be in [0, 1)")
    if optim.overlap_param_gather and not optim.distributed:
        raise ConfigError(
            "model.optim.overlap_param_gather=true is of the distributed optimizer, whose replicas each update a part "
            "of the weights; set model.optim.distributed=true, or remove it"
        )
    if optim.overlap_param_gather and optim.overlap_grad_reduce is False:
        raise ConfigError(
            "model.optim.overlap_param_gather=true takes the buckets of model.optim.overlap_grad_reduce, which is "
            "false; remove one of them"
        )


def _check_lengths(model: ModelConfig) -> None:
    data = model.data
    if data.max_length <= data.max_prompt_length:
        raise ConfigError(
            f"model.data.max_length={data.max_length} leaves no room for a response after a prompt of "
            f"model.data.max_prompt_length={data.max_prompt_length} tokens; raise the first or lower the second"
        )


def _check_profile(model: ModelConfig) -> None:
    for name, window in (("model.profile", model.profile), ("model.nsys_profile", model.nsys_profile)):
        _at_least(f"{name}.start_step", window.start_step, 1)
        _at_least(f"{name}.end_step", window.end_step, window.start_step)
        if not window.ranks or any(not isinstance(rank, int) or rank < 0 for rank in window.ranks):
            raise ConfigError(f"{name}.ranks={list(window.ranks)} must name one rank or more, from 0")
    if model.profile.enabled and model.nsys_profile.enabled:
        raise ConfigError(
            "model.profile and model.nsys_profile are both enabled, and a GPU reports to one profiler at a time; "
            "disable one"
        )


def _one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value} is not known; choose one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: float) -> None:
    if not (is_finite(value) and value >= least):
        raise ConfigError(f"{name}={value} must be {least} or more")
