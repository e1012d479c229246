"""What the ranks run in these tests: a model at a layout, and one real training step of it. Imported by the ranks."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpo_megatron import objectives
from mpo_megatron.config import OptimConfig, SchedConfig
from mpo_megatron.conversion.export import export_hf
from mpo_megatron.conversion.load import global_parameter_names, load_hf_weights
from mpo_megatron.model.architecture import Architecture, read_architecture
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import ParallelLayout, initialize
from mpo_megatron.training.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from mpo_megatron.training.rows import RowSource
from mpo_megatron.training.step import logprob_only, mean_metrics, objective_loss, run_schedule
from tests.helpers.models import GroupsInMemory, make_groups


@dataclass(frozen=True)
class Layout:
    """A layout under test; data parallelism takes what is left of the ranks."""

    tp: int = 1
    pp: int = 1
    distributed_optimizer: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of ModelOptions
    shared_prompt: bool = True
    max_tokens: int = 256


@dataclass
class Model:
    """A model on this rank, with its data."""

    architecture: Architecture
    layout: ParallelLayout
    chunks: list[Any]
    optimizer: Any
    schedule: Any
    source: RowSource


def build(folder: Path, sizes: list[int], wanted: Layout, lr: float = 1e-3) -> Model:
    """The model of `folder` at a layout, over random groups of the given sizes (the same on every rank)."""
    from megatron.core import tensor_parallel

    layout = initialize(choose_device("cpu"), tp=wanted.tp, pp=wanted.pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    architecture = read_architecture(folder)
    options = ModelOptions(**{"sequence_parallel": wanted.tp > 1, "head_chunk_size": 7, **wanted.options})
    chunks = build_model(architecture, layout, options)
    for chunk in chunks:
        load_hf_weights(unwrap(chunk), architecture, layout, folder)
    chunks = wrap_data_parallel(chunks, wanted.distributed_optimizer)
    optim = OptimConfig(lr=lr, distributed=wanted.distributed_optimizer, sched=SchedConfig(warmup_ratio=0.0))
    optimizer = build_optimizer(chunks, optim, 1.0, options.dtype)
    source = RowSource(
        GroupsInMemory(make_groups(sizes, architecture.vocab_size)),  # type: ignore[arg-type]
        max_tokens=wanted.max_tokens,
        alignment=8,
        shared_prompt=wanted.shared_prompt,
        cost=architecture.cost_model,
        data_parallel=layout.dp,
        data_parallel_rank=layout.dp_rank,
        device=layout.device,
    )
    return Model(architecture, layout, chunks, optimizer, build_schedule(optimizer, optim, 10), source)


def logps(model: Model) -> torch.Tensor:
    """[R] log-probs of all responses of the data, the same on all ranks."""
    rows = model.source.step(range(len(model.source.dataset)))
    values = torch.zeros(int(model.source.dataset.response_offsets[-1]))
    for kept in run_schedule(model.chunks, rows, logprob_only, forward_only=True):
        if model.layout.speaks_for_replica:
            values[kept["response_ids"]] = kept["logps"]
    dist.all_reduce(values)
    return values


def gradients(model: Model, reference: torch.Tensor, objective: str) -> dict[str, float]:
    """Run forward and backward of the whole data as one step; gradients stay in the parameters' main_grad."""
    rows = model.source.step(range(len(model.source.dataset)))
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    loss = objective_loss(
        partial(objectives.get(objective), beta=0.1, alpha=0.3, weighting="absolute"), reference
    )
    kept = run_schedule(model.chunks, rows, loss, forward_only=False)
    return mean_metrics(kept, rows.groups, model.layout)


def step_and_gradients(
    folder: Path, sizes: list[int], wanted: Layout, objective: str, output: Path
) -> dict[str, Any]:
    """One training step. The gradients go to `output` as a Hugging Face folder, under Hugging Face's names.

    Returns the metrics, the log-probs before the step, the gradient norm, and the largest absolute value in the
    gradient of the vocabulary's padding.
    """
    model = build(folder, sizes, wanted)
    before = logps(model)
    metrics = gradients(model, before + torch.linspace(-3, 3, len(before)), objective)
    inner = unwrap(model.chunks[0])
    padding = _largest_padding_gradient(model)
    weights = {name: p.detach().clone() for name, p in inner.named_parameters()}
    if not wanted.distributed_optimizer:
        for parameter in inner.parameters():
            parameter.data.copy_(parameter.main_grad)
        export_hf(inner, model.architecture, model.layout, source=folder, output=output)
        for name, parameter in inner.named_parameters():
            parameter.data.copy_(weights[name])
    _, norm, _ = model.optimizer.step()
    after = logps(model)
    return {"metrics": metrics, "logps": before, "norm": norm, "padding": padding, "after": after}


def _largest_padding_gradient(model: Model) -> float:
    vocab, rank = model.architecture.vocab_size, model.layout.tp_rank
    largest = 0.0
    named: dict[str, Any] = dict(global_parameter_names(unwrap(model.chunks[0])))
    for name, parameter in named.items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            real = max(0, vocab - rank * parameter.size(0))
            if real < parameter.size(0):
                largest = max(largest, parameter.main_grad[real:].abs().max().item())
    return largest


def export(folder: Path, wanted: Layout, output: Path, max_shard_bytes: int = 10**9) -> None:
    """Load a Hugging Face folder at a layout and export it again."""
    model = build(folder, [2], wanted)
    inner = unwrap(model.chunks[0])
    export_hf(
        inner, model.architecture, model.layout, source=folder, output=output, max_shard_bytes=max_shard_bytes
    )


def train_and_export(folder: Path, sizes: list[int], wanted: Layout, output: Path) -> torch.Tensor:
    """Two training steps, then the export. Returns the log-probs of the trained Megatron model."""
    model = build(folder, sizes, wanted)
    reference = logps(model)
    for _ in range(2):
        gradients(model, reference, "wmpo")
        model.optimizer.step()
    inner = unwrap(model.chunks[0])
    export_hf(inner, model.architecture, model.layout, source=folder, output=output)
    return logps(model)


def smollm2_logps(folder: Path, data: Path, groups: int, shared_prompt: bool, cache: Path) -> torch.Tensor:
    """[R] log-probs of the first groups of a data file under the starting weights, on one rank."""
    from transformers import AutoTokenizer

    from mpo_megatron.data import TokenizeOptions, build_dataset

    options = TokenizeOptions(max_prompt_length=256, max_length=512)
    dataset = build_dataset(data, AutoTokenizer.from_pretrained(folder), options, cache_dir=cache)
    model = build(
        folder, [2], Layout(shared_prompt=shared_prompt, max_tokens=2048, options={"head_chunk_size": 256})
    )
    model.source.dataset = GroupsInMemory([dataset.group(i) for i in range(groups)])  # type: ignore[assignment]
    return logps(model)
