"""The typed schema of the main job's YAML: every key, its default and what it is.

A YAML in conf/ names only what differs from the defaults here. Which values there can be, alone and together, is in
`rules`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

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
