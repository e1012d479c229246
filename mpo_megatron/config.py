"""The typed schema of the YAML: every default and every check that needs no model and no data.

A YAML in conf/ names only what differs from the defaults here. `parse` merges it into these classes: an unknown key, a
value of the wrong type or one outside its range stops the run with the value, the rule and the fix. The
result is frozen.
"""

import difflib
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from mpo_megatron.errors import ConfigError

# Faults of data that can be trained on.
KEPT_FAULTS = ("duplicate_id", "unequal_scores", "equal_responses")
# Metrics of validation that checkpoints can be compared by, and which is better: the least or the greatest.
MONITORS = {"loss": "min", "reward_margin": "max", "accuracy": "max", "preferred_reward": "max"}


@dataclass(frozen=True)
class CheckpointConfig:
    """How checkpoints are written, and which are kept; see docs/checkpoints.md. Names as in NeMo and Megatron."""

    # Keep the best by `monitor`, so many, and the newest; validation is then made before each is written. -1: do not.
    save_top_k: int = -1
    monitor: str = "loss"  # metric of validation: loss | reward_margin | accuracy | preferred_reward
    mode: str | None = None  # which is better: min | max; null: min of the loss, max of the others
    most_recent_k: int = -1  # keep so many of the newest; -1, with save_top_k=-1: remove none
    # Write them in the background, from a copy in host memory of each rank's share, while training goes on.
    async_save: bool = False
    # Whether they have the distributed optimizer's state in the parameters' shapes, as other programs read it at any
    # layout, for which it is gathered. This package reads either form at any layout.
    dist_ckpt_optim_fully_reshardable: bool = False

    @property
    def removes_some(self) -> bool:
        """Whether there is a rule by which checkpoints are removed."""
        return self.save_top_k != -1 or self.most_recent_k != -1


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how often, in which precision. Names as in NeMo and Lightning."""

    num_nodes: int = 1  # with `devices`, a check: torchrun says how many there are
    devices: int | None = None  # ranks on each node; null: as many as torchrun started
    distributed_timeout_minutes: int = 30  # after which a collective that waits for a rank counts as hung
    # After which a rank that gives no sign of life, of which each gives one every two seconds, ends all; 0: never.
    heartbeat_timeout_minutes: float = 5.0
    accelerator: str = "auto"  # auto (the GPU where there is one) | gpu | cpu
    precision: int | str = "bf16"  # bf16 | 32
    seed: int = 1234  # of the order of the groups, and of drawn masters
    max_epochs: int = 1  # passes over the groups; not looked at if max_steps is given
    max_steps: int = -1  # optimizer steps, over as many epochs as they take; -1: all of max_epochs
    log_every_n_steps: int = 1  # steps of which one is logged
    # Steps between validations (>= 1), a part of an epoch (< 1), or 0: at start and end only.
    val_check_interval: float = 0
    limit_val_batches: int | None = None  # validation steps of global_batch_size groups; null: all
    # Write every held-out response's log-prob and reward, too: validation/step_NNNNNNN.jsonl in the run's folder.
    log_val_groups: bool = False
    save_interval: int = 0  # steps between checkpoints; 0: at the end only
    save_at_end: bool = True  # write a checkpoint after the last step
    gradient_clip_val: float = 1.0  # global norm; 0: no clipping
    # A step whose loss or gradient is not finite is left out; so many in a row end the run, with its state saved.
    max_skipped_steps: int = 3
    # Steps over which loss, margin and rewards are watched for spikes, collapse and joint falls; 0: no warnings.
    watch_window: int = 20
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class PackConfig:
    """How groups lie in a row."""

    # False stores a prompt once per response: the same loss, slower; for comparison.
    shared_prompt: bool = True
    # Tokens of a row, on each context-parallel rank: fewer lengths, which leave less of a GPU's memory in pieces, for
    # more padding; null: 64 on GPUs, 8 on CPUs.
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class MpoConfig:
    """The objective, and beside these keys its hyper-parameters: `tools/objectives.py` prints both.

    In a YAML and on the command line hyper-parameters stand beside the other keys (`model.mpo.beta`); null is as if
    left out. Which of them the objective takes, their ranges and defaults are the objective's own; `objectives.settle`
    checks them when a run starts.
    """

    objective: str = "wmpo"  # a name that tools/objectives.py prints
    sft_weight: float = 0.0  # of an SFT term on the best response, per token
    # Which responses are preferred: above the mean | median | trimmed_mean, the best, or those of keep_best (selected).
    partition: str = "mean"
    # cached (log-probs of the starting weights, computed once and kept on disk) | none; null: as the objective needs.
    reference: str | None = None
    # A model of the same sizes whose log-probs are the reference, in the starting weights' place.
    reference_from_path: str | None = None
    # Take cached log-probs only if they are those of this run's own rows to the last bit; false: any of the same
    # weights, data and precision, from other layouts, batches, machines and versions too.
    reference_exact: bool = True
    hyper_parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SchedConfig:
    """Learning-rate schedule over the run's steps."""

    name: str = "CosineAnnealing"  # CosineAnnealing | Linear | Constant
    warmup_ratio: float = 0.1  # part of the steps in which the learning rate rises
    warmup_steps: int | None = None  # instead of warmup_ratio
    min_lr: float = 0.0  # where the schedule ends


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    lr: float = 5e-7  # the highest of the schedule
    weight_decay: float = 0.0  # decoupled from the gradient
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the first and of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    distributed: bool = True  # share the optimizer state among the data-parallel ranks
    # Sum gradients over the replicas while others are computed; null: on GPUs.
    overlap_grad_reduce: bool | None = None
    # Fetch the weights that other replicas have updated while others are used; takes optim.distributed and
    # overlap_grad_reduce; null: on GPUs with these.
    overlap_param_gather: bool | None = None
    # Where the float32 masters of bf16 weights begin: auto (at the starting model's own values, within their rounding;
    # see docs/master-weights.md) | rounded (at the bf16 weights).
    master_weights: str = "auto"
    sched: SchedConfig = field(default_factory=SchedConfig)

    def overlap(self, on_gpus: bool) -> tuple[bool, bool]:
        """(overlap_grad_reduce, overlap_param_gather), with what is left open settled."""
        reduce, gather = self.overlap_grad_reduce, self.overlap_param_gather
        if reduce is None:
            reduce = on_gpus or bool(gather)
        if gather is None:
            gather = on_gpus and reduce and self.distributed
        return reduce, gather


@dataclass(frozen=True)
class FaultConfig:
    """What becomes of a record of the data that is at fault: error (the run stops before its first step) | skip (its
    group is left out, counted, and noted with the reason) | keep, where it can be trained on. See docs/data.md.
    """

    unreadable: str = "error"  # no JSON, no UTF-8, or a line of 64 MiB: error | skip
    shape: str = "error"  # no known shape, a value of another type, fewer than two responses: error | skip
    score: str = "error"  # none, no number, or not finite: error | skip
    empty: str = "error"  # a prompt or a response that is white space: error | skip
    template: str = "error"  # messages that the chat template refuses: error | skip
    duplicate_id: str = "error"  # the id of an earlier record: error | skip | keep
    unequal_scores: str = "error"  # two responses of one text with different scores: error | skip | keep
    equal_responses: str = "keep"  # two responses of one text with one score: error | skip | keep


@dataclass(frozen=True)
class DataConfig:
    """Which groups, and how they become tokens. Lengths are in tokens."""

    train: str = MISSING  # JSONL, Parquet, a folder that `datasets` reads, or a hub name
    validation: str | None = None  # as train; null: no validation
    max_length: int = 4096  # prompt and response together
    max_prompt_length: int = 2048  # of the prompt, chat template included
    truncation: str = "error"  # a prompt above max_prompt_length: error | skip | left (keep its end)
    faults: FaultConfig = field(default_factory=FaultConfig)
    apply_chat_template: bool | None = None  # null: if the tokenizer has a template
    system_prompt: str | None = None  # put before prompts that have none
    keep_first: int | None = None  # train on each group's first so many responses; null: on all
    # Train on so many of each group's best and of its worst responses; null: on all. Of those that keep_first leaves.
    keep_best: int | None = None
    keep_worst: int | None = None  # as keep_best, of the worst
    score_noise: float = 0.0  # standard deviation of Gaussian noise on the scores, in units of score
    score_noise_seed: int = 0  # of the noise, with each group's id
    # What validation is on: selected (as training: noise, keep_first, keep_best, keep_worst, partition) | all (all
    # responses by the data's own scores, preferred above their mean), so that runs which train on other selections are
    # measured by the same.
    validate_on: str = "selected"
    # Leave groups without a preferred response out; null: if they say nothing to the objective.
    require_preferred: bool | None = None
    cache_dir: str = "~/.cache/mpo_megatron"  # tokenised data and reference log-probs
    # Steps whose rows a thread plans, reads and packs ahead of the step that trains on them; 0: none, no thread.
    prefetch_factor: int = 2


@dataclass(frozen=True)
class ProfileConfig:
    """Steps of which some ranks take a profile, with NeMo's names: `model.profile` by torch's profiler, a trace of each
    rank in the run's folder; `model.nsys_profile` for Nsight Systems, on GPUs.
    """

    enabled: bool = False  # of the two, one at a time
    start_step: int = 10  # the first optimizer step of the profile, from 1; let some go before, to warm up
    end_step: int = 10  # the last
    ranks: tuple[int, ...] = (0,)  # of all the run's ranks
    gen_shape: bool = False  # the shapes of what goes into each operation, too


@dataclass(frozen=True)
class ModelConfig:
    """The model, its layout, and what it is trained on."""

    # A Hugging Face folder, or a checkpoint of a run or of tools/convert_checkpoint.py.
    restore_from_path: str = MISSING
    # Where the trained Hugging Face folder goes; null: <experiment folder>/hf; "": nowhere.
    export_path: str | None = None
    # Of its weights: bf16 (float32 masters rounded) | float32 (the masters whole); null: as trained.
    export_dtype: str | None = None
    # Make a Hugging Face folder of every checkpoint, in the background: <experiment folder>/exports/step_NNNNNNN.
    export_at_save: bool = False
    tensor_model_parallel_size: int = 1  # ranks that share each matrix
    pipeline_model_parallel_size: int = 1  # ranks that the layers are cut over
    virtual_pipeline_model_parallel_size: int | None = None  # model chunks of a pipeline rank, interleaved
    num_layers_in_first_pipeline_stage: int | None = None  # of the first stage; null: as many as the others
    num_layers_in_last_pipeline_stage: int | None = None  # of the last stage; null: as many as the others
    context_parallel_size: int = 1  # ranks that share each row
    expert_model_parallel_size: int = 1  # ranks of context x data parallelism that share a layer's experts
    # Tensor-parallel ranks share the sequence outside attention and feed-forward parts; null: with tensor parallelism.
    sequence_parallel: bool | None = None
    transformer_impl: str = "auto"  # whose layers: auto | transformer_engine | local
    attention_backend: str = "auto"  # auto | varlen | te | sdpa
    head_backend: str = "eager"  # what makes log-probs of the last hidden states: eager | triton | auto
    # 8-bit products in Transformer Engine's layers: null | hybrid | e4m3; see mpo_megatron/model/fp8.py.
    fp8: str | None = None
    fp8_recipe: str = "tensorwise"  # how scales are found: delayed | tensorwise | blockwise | mxfp8
    num_layers_at_start_in_bf16: int = 0  # layers without FP8 at the start of the model
    num_layers_at_end_in_bf16: int = 0  # layers without FP8 at its end
    activations_checkpoint_granularity: str | None = None  # what is recomputed: null | selective | full
    activations_checkpoint_method: str | None = None  # of full recomputation: uniform | block
    activations_checkpoint_num_layers: int | None = None  # of full recomputation
    make_vocab_size_divisible_by: int = 128  # embedding rows of a tensor-parallel rank, padded
    head_chunk_size: int = 1024  # response tokens whose logits exist at a time
    global_batch_size: int = 128  # prompts (groups) per optimizer step
    max_tokens_per_micro_batch: int = 8192  # token budget of a row
    pack: PackConfig = field(default_factory=PackConfig)
    mpo: MpoConfig = field(default_factory=MpoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    nsys_profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def reference_path(self) -> str:
        """Whose log-probs the reference is."""
        return self.mpo.reference_from_path or self.restore_from_path


@dataclass(frozen=True)
class Config:
    """The whole YAML. `exp_manager` is NeMo's own section and is checked by NeMo."""

    name: str = "mpo_gpt"  # of the run's folder
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: dict[str, Any] = field(default_factory=dict)  # below
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def precision(self) -> str:
        """`bf16` or `32`."""
        return str(self.trainer.precision)

    @property
    def sequence_parallel(self) -> bool:
        """As asked, or with tensor parallelism."""
        asked = self.model.sequence_parallel
        return self.model.tensor_model_parallel_size > 1 if asked is None else asked


def parse(raw: DictConfig) -> Config:
    """Merge a YAML with Hydra's overrides into the schema and check it.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value, or a broken rule.
    """
    check_keys(OmegaConf.to_container(raw), Config, "")
    try:
        merged = OmegaConf.merge(_schema(), raw)
        assert isinstance(merged, DictConfig)
        _check_missing(merged)
        hyper_parameters = _take_hyper_parameters(merged.model.mpo)
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ValidationError, OmegaConfBaseException) as error:
        raise ConfigError(f"{_key(error)}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    mpo = replace(config.model.mpo, hyper_parameters=hyper_parameters)
    config = replace(config, model=replace(config.model, mpo=mpo))
    _check(config)
    return config


def as_yaml(config: Config) -> dict[str, Any]:
    """What `parse` makes the same configuration of."""
    found = asdict(config)
    found["model"]["mpo"] |= found["model"]["mpo"].pop("hyper_parameters")
    return found


def register_schema(name: str = "schema") -> None:
    """Enter the schema in Hydra's store, so that a YAML with `defaults: [schema, _self_]` takes any known key."""
    ConfigStore.instance().store(name=name, node=_schema())


def _schema() -> DictConfig:
    """The classes above as OmegaConf has them, with two sections that take keys not named there: NeMo's, and the
    objective's hyper-parameters beside the keys of `model.mpo`.
    """
    schema: DictConfig = OmegaConf.structured(Config)
    make_writable(schema)
    OmegaConf.set_struct(schema.exp_manager, False)
    OmegaConf.set_struct(schema.model.mpo, False)
    del schema.model.mpo["hyper_parameters"]
    return schema


def _take_hyper_parameters(mpo: DictConfig) -> dict[str, Any]:
    """Take what is no key of MpoConfig out of the section."""
    own = {f.name for f in fields(MpoConfig)} - {"hyper_parameters"}
    found = {str(key): mpo[key] for key in mpo if key not in own}
    for key in found:
        del mpo[key]
    return {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for key, value in found.items()
    }


def check_overrides(arguments: Sequence[str], groups: Collection[str] = ()) -> None:
    """Check the keys of Hydra's `key=value` arguments before Hydra does, for a message in one sentence.

    Args:
        groups: names that choose a file of settings (`config_groups`) and are no keys.

    Raises:
        ConfigError: an override names a key that the schema does not have, or cannot be parsed.
    """
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"cannot read the override: {' '.join(str(error).split())}") from error
    for override in parsed:
        key = override.key_or_group
        if key not in groups and not key.startswith(("hydra.", "hydra/", "exp_manager")) and key != "hydra":
            nested: Any = {}
            for part in reversed(key.split(".")):
                nested = {part: nested}
            check_keys(nested, Config, "")


def check_keys(value: Any, schema: type, path: str) -> None:
    """Raise ConfigError for the first key that the schema does not have, with the nearest one that it has.

    Keys of `model.mpo` may be an objective's: `objectives.settle` checks them.
    """
    if not isinstance(value, dict):
        return
    known = {f.name: f for f in fields(schema)}
    for key, below in value.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known keys are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {path}{key}; {hint}")
        section = known[key].type
        if isinstance(section, type) and is_dataclass(section) and section is not MpoConfig:
            check_keys(below, section, f"{path}{key}.")


def make_writable(node: DictConfig) -> None:
    """OmegaConf takes a frozen dataclass for a node that no YAML may change."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            make_writable(child)


def _key(error: OmegaConfBaseException) -> str:
    return str(getattr(error, "full_key", None) or "configuration")


def _check_missing(merged: DictConfig) -> None:
    """Raise ConfigError that names every required key without a value: `???`, in the schema or in a YAML."""
    missing = sorted(OmegaConf.missing_keys(merged), reverse=True)
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value; set "
            f"{'it' if len(missing) == 1 else 'them'} in the YAML or as {' '.join(f'{key}=...' for key in missing)}"
        )


def _check(config: Config) -> None:
    """Rules on single values and between them."""
    trainer, model = config.trainer, config.model
    mpo, data = model.mpo, model.data

    _one_of("trainer.accelerator", trainer.accelerator, ("auto", "gpu", "cpu"))
    _one_of("trainer.precision", config.precision, ("bf16", "32"))
    _one_of("model.transformer_impl", model.transformer_impl, ("auto", "transformer_engine", "local"))
    _one_of("model.attention_backend", model.attention_backend, ("auto", "varlen", "te", "sdpa"))
    _one_of("model.head_backend", model.head_backend, ("eager", "triton", "auto"))
    _check_fp8(config)
    if model.export_dtype is not None:
        _one_of("model.export_dtype", model.export_dtype, ("bf16", "float32"))
    if mpo.reference is not None:
        _one_of("model.mpo.reference", mpo.reference, ("cached", "none"))
    _one_of("model.data.truncation", data.truncation, ("error", "skip", "left"))
    _one_of("model.data.validate_on", data.validate_on, ("selected", "all"))
    for fault in fields(FaultConfig):
        policies = ("error", "skip", "keep") if fault.name in KEPT_FAULTS else ("error", "skip")
        _one_of(f"model.data.faults.{fault.name}", getattr(data.faults, fault.name), policies)
    if model.activations_checkpoint_granularity is not None:
        _one_of(
            "model.activations_checkpoint_granularity",
            model.activations_checkpoint_granularity,
            ("selective", "full"),
        )
    if model.activations_checkpoint_granularity == "full":
        _one_of(
            "model.activations_checkpoint_method", model.activations_checkpoint_method, ("uniform", "block")
        )
        _at_least("model.activations_checkpoint_num_layers", model.activations_checkpoint_num_layers or 0, 1)

    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "global_batch_size",
        "max_tokens_per_micro_batch",
        "make_vocab_size_divisible_by",
        "head_chunk_size",
    ):
        _at_least(f"model.{name}", getattr(model, name), 1)
    for name in (
        "num_nodes", "max_epochs", "log_every_n_steps", "distributed_timeout_minutes", "max_skipped_steps"
    ):  # fmt: skip
        _at_least(f"trainer.{name}", getattr(trainer, name), 1)
    for name in (
        "val_check_interval", "save_interval", "gradient_clip_val", "watch_window", "heartbeat_timeout_minutes"
    ):  # fmt: skip
        _at_least(f"trainer.{name}", getattr(trainer, name), 0)
    if trainer.max_steps != -1:
        _at_least("trainer.max_steps", trainer.max_steps, 1)
    if trainer.val_check_interval >= 1 and trainer.val_check_interval != int(trainer.val_check_interval):
        raise ConfigError(
            f"trainer.val_check_interval={trainer.val_check_interval} must be a whole number of steps, or below 1"
        )

    _check_pipeline(model)
    _check_optim(model.optim)
    _check_checkpoints(config)
    _check_profile(model)
    if model.export_at_save and not trainer.save_interval and not trainer.save_at_end:
        raise ConfigError(
            "model.export_at_save=true exports every checkpoint and there will be none; set trainer.save_interval, "
            "or remove export_at_save"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise ConfigError(
            "model.sequence_parallel=true needs tensor_model_parallel_size > 1; "
            "set it to false or raise tensor_model_parallel_size"
        )
    for name, value, least in (
        ("trainer.limit_val_batches", trainer.limit_val_batches, 1),
        ("trainer.devices", trainer.devices, 1),
        ("model.pack.pad_to_multiple_of", model.pack.pad_to_multiple_of, 1),
    ):
        if value is not None:
            _at_least(name, value, least)
    _at_least("model.mpo.sft_weight", mpo.sft_weight, 0)
    _at_least("model.data.max_prompt_length", data.max_prompt_length, 1)
    _at_least("model.data.prefetch_factor", data.prefetch_factor, 0)
    if data.max_length <= data.max_prompt_length:
        raise ConfigError(
            f"model.data.max_length={data.max_length} leaves no room for a response after a prompt of "
            f"model.data.max_prompt_length={data.max_prompt_length} tokens; raise the first or lower the second"
        )


def _check_optim(optim: OptimConfig) -> None:
    _one_of("model.optim.master_weights", optim.master_weights, ("auto", "rounded"))
    _one_of("model.optim.sched.name", optim.sched.name, ("CosineAnnealing", "Linear", "Constant"))
    _at_least("model.optim.weight_decay", optim.weight_decay, 0)
    _positive("model.optim.eps", optim.eps)
    _positive("model.optim.lr", optim.lr)
    _at_least("model.optim.sched.min_lr", optim.sched.min_lr, 0)
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
    if optim.sched.warmup_steps is not None:
        _at_least("model.optim.sched.warmup_steps", optim.sched.warmup_steps, 0)
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


def _check_checkpoints(config: Config) -> None:
    rule = config.trainer.checkpoint
    _one_of("trainer.checkpoint.monitor", rule.monitor, MONITORS)
    if rule.mode is not None:
        _one_of("trainer.checkpoint.mode", rule.mode, ("min", "max"))
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


def _check_fp8(config: Config) -> None:
    model = config.model
    _one_of("model.fp8_recipe", model.fp8_recipe, ("delayed", "tensorwise", "blockwise", "mxfp8"))
    kept = [
        name for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16") if getattr(model, name)
    ]
    for name in kept:
        _at_least(f"model.{name}", getattr(model, name), 0)
    if model.fp8 is None:
        if kept:
            raise ConfigError(
                f"model.{kept[0]} says which layers FP8 leaves alone, and model.fp8 is off; remove it"
            )
        return
    _one_of("model.fp8", model.fp8, ("hybrid", "e4m3"))
    if config.precision != "bf16":
        raise ConfigError(
            f"model.fp8={model.fp8} casts the operands of a bf16 model; set trainer.precision=bf16, or remove it"
        )
    if kept and model.fp8_recipe == "delayed":
        raise ConfigError(
            f"model.{kept[0]} goes with any recipe but delayed, whose scales are found for all layers together; "
            "set model.fp8_recipe=tensorwise, or remove it"
        )


def _check_pipeline(model: ModelConfig) -> None:
    virtual = model.virtual_pipeline_model_parallel_size
    if virtual is not None:
        _at_least("model.virtual_pipeline_model_parallel_size", virtual, 1)
        if virtual > 1 and model.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"model.virtual_pipeline_model_parallel_size={virtual} interleaves the stages of a pipeline and needs "
                "pipeline_model_parallel_size > 1; raise it or remove virtual_pipeline_model_parallel_size"
            )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        layers = getattr(model, name)
        if layers is not None:
            _at_least(f"model.{name}", layers, 1)
            if model.pipeline_model_parallel_size == 1:
                raise ConfigError(
                    f"model.{name}={layers} is for one stage of a pipeline and needs "
                    f"pipeline_model_parallel_size > 1; raise it or remove {name}"
                )


def _one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value} is not known; choose one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name}={value} must be {least} or more")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} must be positive")
