"""What the ranks run in these tests: a model at a layout, and one real training step of it. Imported by the ranks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpo_megatron import objectives
from mpo_megatron.config import OptimConfig, SchedConfig
from mpo_megatron.conversion.export import export_hf
from mpo_megatron.conversion.hf_folder import is_checkpoint, model_folder
from mpo_megatron.conversion.load import global_parameter_names, load_hf_weights
from mpo_megatron.conversion.restore import load_megatron_weights
from mpo_megatron.data import GroupList
from mpo_megatron.model.architecture import Architecture, read_architecture
from mpo_megatron.model.fp8 import row_alignment
from mpo_megatron.model.head import choose_head
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap
from mpo_megatron.objectives.registry import Objective
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import ParallelLayout, initialize
from mpo_megatron.scheduling.plan import Pipeline
from mpo_megatron.scheduling.rows import RowSource, StepRows
from mpo_megatron.training.checkpoint_writer import CheckpointWriter
from mpo_megatron.training.data_parallel import DataParallel, current_models, wrap_data_parallel
from mpo_megatron.training.optimizer import build_optimizer, build_schedule
from mpo_megatron.training.step import objective_pass, response_logps
from tests.helpers.models import make_groups
from tests.helpers.objectives import SETTINGS


@dataclass(frozen=True)
class Layout:
    """A layout under test; data parallelism takes what is left of the ranks."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False  # of gradient sums, and with the distributed optimizer of fetching weights
    options: dict[str, Any] = field(default_factory=dict)  # of ModelOptions
    shared_prompt: bool = True
    global_batch: bool = True  # two passes for objectives that need it; False where one row holds the batch
    multiple: int | None = None  # that rows are padded to
    max_tokens: int = 256
    precision: torch.dtype = torch.float32
    accelerator: str = "cpu"  # or gpu
    longest: int = 24  # above the tokens of the longest prompt or response


@dataclass
class Model:
    """A model on this rank, with its data."""

    architecture: Architecture
    layout: ParallelLayout
    chunks: list[Any]
    optimizer: Any
    schedule: Any
    source: RowSource
    global_batch: bool


def build(folder: Path, sizes: list[int], wanted: Layout, lr: float = 1e-3, seed: int = 0) -> Model:
    """The model of `folder` (Hugging Face, or a checkpoint) at a layout, over random groups of the given sizes and seed
    (the same on every rank).
    """
    from megatron.core import tensor_parallel

    layout = initialize(
        choose_device(wanted.accelerator),
        tp=wanted.tp,
        pp=wanted.pp,
        vpp=wanted.vpp,
        cp=wanted.cp,
        ep=wanted.ep,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    architecture = read_architecture(model_folder(folder))
    options = ModelOptions(
        **{
            "dtype": wanted.precision,
            "sequence_parallel": wanted.tp > 1,
            "head_backend": choose_head("auto", layout.device, wanted.precision),
            "head_chunk_size": 7,
            **wanted.options,
        }
    )
    chunks = build_model(architecture, layout, options)
    inner = [unwrap(chunk) for chunk in chunks]
    if is_checkpoint(folder):
        load_megatron_weights(inner, layout, folder)
    else:
        load_hf_weights(inner, architecture, layout, folder)
    gather = wanted.overlap and wanted.distributed_optimizer
    # Small, so that the model has several.
    size = 5000 if wanted.overlap else None
    chunks = wrap_data_parallel(
        chunks, DataParallel(wanted.distributed_optimizer, wanted.overlap, gather, size)
    )
    optim = OptimConfig(lr=lr, distributed=wanted.distributed_optimizer, sched=SchedConfig(warmup_ratio=0.0))
    clip = 0.0 if options.dtype == torch.float64 else 1.0  # Megatron clips float32 gradients alone
    optimizer = build_optimizer(chunks, optim, clip, options.dtype)
    source = RowSource(
        GroupList(make_groups(sizes, architecture.vocab_size, seed=seed, longest=wanted.longest)),
        max_tokens=wanted.max_tokens,
        alignment=row_alignment(options.fp8, layout.tp, layout.device, wanted.multiple) * layout.cp,
        shared_prompt=wanted.shared_prompt,
        cost=architecture.cost_model,
        data_parallel=(layout.dp, layout.dp_rank),
        context=(layout.cp, layout.cp_rank),
        pipeline=Pipeline(layout.pp, layout.vpp),
        device=layout.device,
    )
    return Model(
        architecture,
        layout,
        chunks,
        optimizer,
        build_schedule(optimizer, optim, 10),
        source,
        wanted.global_batch,
    )


def save(model: Model, step: int, folder: Path, source: Path, form: str = "dp_reshardable") -> Path:
    """Write a checkpoint into `folder`, with the tokenizer of `source`."""
    writer = CheckpointWriter(folder, model.layout, form)
    writer.start(step, model.chunks, model.optimizer, model.schedule, {"config.yaml": "a: 1\n"}, source)
    path = writer.finish()
    assert path is not None
    return path


def logps(model: Model) -> torch.Tensor:
    """[R] log-probs of all responses of the data, the same on all ranks."""
    rows = model.source.step(range(len(model.source.dataset)))
    size = int(model.source.dataset.response_offsets[-1])
    return response_logps(model.chunks, [rows], size, model.layout)


def objective_named(name: str) -> Objective:
    """Of the registry, with the settings of tests.helpers.objectives; with an SFT term if the name ends in "+sft"."""
    plain = name.removesuffix("+sft")
    return objectives.bind(objectives.get(plain), SETTINGS[plain], sft_weight=0.0 if plain == name else 0.7)


def step_for(model: Model, objective: str) -> StepRows:
    """The whole data as one step."""
    entry = objectives.get(objective.removesuffix("+sft"))
    model.source.global_batch = model.global_batch and entry.needs_global_batch
    return model.source.step(range(len(model.source.dataset)))


def gradients(model: Model, reference: torch.Tensor, objective: str) -> dict[str, float]:
    """Run forward and backward of the whole data as one step; gradients stay in the parameters' main_grad."""
    rows = step_for(model, objective)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    return objective_pass(
        model.chunks, rows, objective_named(objective), reference, model.layout, forward_only=False
    )


def evaluate(model: Model, reference: torch.Tensor, objective: str) -> dict[str, float]:
    """The same forward only, as a validation does."""
    rows = step_for(model, objective)
    return objective_pass(
        model.chunks, rows, objective_named(objective), reference, model.layout, forward_only=True
    )


def steps_and_gradients(
    folder: Path,
    sizes: list[int],
    seed: int,
    wanted: Layout,
    budgets: dict[str, int],
    names: list[str] | dict[str, list[str]],
    output: Path,
) -> dict[str, Any]:
    """Steps without an update for every budget and its objectives, and an update after the last.

    Args:
        sizes: responses of each group.
        seed: of the groups.
        budgets: tokens of a row, by name.
        names: of the objectives; by budget, where they are not the same for all.
        output: the gradients go to `output/<budget>-<objective>` as Hugging Face folders, under their names there.

    Returns:
        `logps`, `split` (groups in more than one part) and `evaluated` (its first objective's metrics, forward only) by
        budget; `metrics` and `norm` by "<budget>-<objective>"; `padding`, the largest absolute value in the gradient of
        the vocabulary's padding; and `after`, the log-probs after the update.
    """
    if isinstance(names, list):
        names = dict.fromkeys(budgets, names)
    model = build(folder, sizes, wanted, seed=seed)
    inner = current_models(model.chunks)
    parameters = [parameter for one in inner for parameter in one.parameters()]
    found: dict[str, Any] = {key: {} for key in ("logps", "split", "metrics", "evaluated", "norm")}
    found["padding"] = 0.0
    for budget, max_tokens in budgets.items():
        model.source.max_tokens = max_tokens
        before = logps(model)
        # The mean log-ratio is 1: KTO's reference point is above 0.
        reference = before + torch.linspace(-4, 2, len(before), device=before.device)
        found["logps"][budget] = before
        found["evaluated"][budget] = evaluate(model, reference, names[budget][0])
        found["split"][budget] = len(model.source.plan(range(len(sizes))).split)
        for name in names[budget]:
            key = f"{budget}-{name}"
            found["metrics"][key] = gradients(model, reference, name)
            model.optimizer.prepare_grads()
            found["norm"][key] = gradient_norm(model)
            if wanted.distributed_optimizer:
                _gather_gradient_shards(model)
            found["padding"] = max(found["padding"], _largest_padding_gradient(model))
            weights = [parameter.detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.data.copy_(parameter.main_grad)
            export_hf(
                inner, model.architecture, model.layout, source=model_folder(folder), output=output / key
            )
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data.copy_(weight)
    gradients(model, reference, names[budget][-1])
    model.optimizer.step()
    found["after"] = logps(model)
    return found


def gradient_norm(model: Model) -> float:
    """Norm of the gradient that Megatron counts: each parameter once over all ranks.

    Megatron adds the squares up in float32; here they are added up in float64, and Megatron's own sum has to agree to
    what float32 holds.
    """
    square = torch.zeros((), dtype=torch.float64, device=model.layout.device)
    for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        # Megatron-core 0.16's name, and that of later ones.
        counted = (
            getattr(optimizer, "get_main_grads_for_grad_norm", None) or optimizer.get_grads_for_grad_norm
        )
        own = sum((gradient.double().square().sum() for gradient in counted()), torch.zeros_like(square))
        dist.all_reduce(own, group=optimizer.get_grad_stats_parallel_group())
        square += own
    norm = float(square.sqrt())
    assert abs(float(model.optimizer.get_grad_norm()) - norm) <= 1e-5 * norm
    return norm


def _gather_gradient_shards(model: Model) -> None:
    """Put the sums that the distributed optimizer leaves on one data-parallel rank each into every rank's main_grad."""
    for chunk in model.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(size, -1)
                dist.all_gather(list(shards.unbind()), shards[rank].clone(), group=group)


def _largest_padding_gradient(model: Model) -> float:
    vocab, rank = model.architecture.vocab_size, model.layout.tp_rank
    largest = 0.0
    for chunk in model.chunks:
        named: dict[str, Any] = dict(global_parameter_names(unwrap(chunk)))
        for name, parameter in named.items():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                real = max(0, vocab - rank * parameter.size(0))
                if real < parameter.size(0):
                    largest = max(largest, parameter.main_grad[real:].abs().max().item())
    return largest


def export(folder: Path, wanted: Layout, output: Path, max_shard_bytes: int = 10**9) -> None:
    """Load a Hugging Face folder at a layout and export it again."""
    model = build(folder, [2], wanted)
    inner = current_models(model.chunks)
    export_hf(
        inner,
        model.architecture,
        model.layout,
        source=model_folder(folder),
        output=output,
        max_shard_bytes=max_shard_bytes,
    )


def logps_and_export(folder: Path, sizes: list[int], seed: int, wanted: Layout, output: Path) -> torch.Tensor:
    """Load a Hugging Face folder at a layout and export it again. Returns the log-probs in between."""
    model = build(folder, sizes, wanted, seed=seed)
    inner = current_models(model.chunks)
    export_hf(inner, model.architecture, model.layout, source=model_folder(folder), output=output)
    return logps(model)


def train_and_export(folder: Path, sizes: list[int], wanted: Layout, output: Path) -> torch.Tensor:
    """Two training steps, then the export. Returns the log-probs of the trained Megatron model."""
    model = build(folder, sizes, wanted)
    reference = logps(model)
    for _ in range(2):
        gradients(model, reference, "wmpo")
        model.optimizer.step()
    inner = current_models(model.chunks)
    export_hf(inner, model.architecture, model.layout, source=model_folder(folder), output=output)
    return logps(model)


def real_groups(folder: Path, data: Path, groups: int, cache: Path) -> GroupList:
    """The first groups of a data file, with a model folder's tokenizer."""
    from transformers import AutoTokenizer

    from mpo_megatron.data import TokenizeOptions, build_dataset

    options = TokenizeOptions(max_prompt_length=256, max_length=512)
    dataset = build_dataset(data, AutoTokenizer.from_pretrained(folder), options, cache_dir=cache)
    return GroupList([dataset.group(i) for i in range(groups)])


def smollm2_logps(folder: Path, data: Path, groups: int, shared_prompt: bool, cache: Path) -> torch.Tensor:
    """[R] log-probs of the first groups of a data file under the starting weights, on one rank."""
    model = build(
        folder, [2], Layout(shared_prompt=shared_prompt, max_tokens=2048, options={"head_chunk_size": 256})
    )
    model.source.dataset = real_groups(folder, data, groups, cache)
    return logps(model)


def smollm2_step(
    folder: Path, data: Path, groups: int, options: dict[str, Any], cache: Path
) -> dict[str, Any]:
    """Reference and first step of W-MPO on these groups in bf16 on Transformer Engine's layers, on one rank.

    Returns:
        `logps` [R], `margin` of the step, and its `gradient`, of all parameters in one.
    """
    wanted = Layout(
        max_tokens=2048,
        options={"head_chunk_size": 256, "transformer_engine": True, **options},
        precision=torch.bfloat16,
    )
    model = build(folder, [2], wanted)
    model.source.dataset = real_groups(folder, data, groups, cache)
    reference = logps(model)
    values = gradients(model, reference, "wmpo")
    own = [parameter.main_grad.flatten() for chunk in model.chunks for parameter in chunk.parameters()]
    return {"logps": reference, "margin": values["reward_margin"], "gradient": torch.cat(own).clone()}
