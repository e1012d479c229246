"""A model on one CPU rank or GPU, and training steps on groups in memory: what the benchmarks time."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from mpo_megatron.benchmarks.measure import measured_on
from mpo_megatron.config import OptimConfig
from mpo_megatron.conversion.load import load_hf_weights
from mpo_megatron.data import GroupList, TokenizedGroup
from mpo_megatron.model.architecture import Architecture, read_architecture
from mpo_megatron.model.attention import choose_backend
from mpo_megatron.model.fp8 import row_alignment
from mpo_megatron.model.head import choose_head
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap, uses_transformer_engine
from mpo_megatron.objectives.mpo import wmpo
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import ParallelLayout, initialize
from mpo_megatron.scheduling.rows import RowSource
from mpo_megatron.training.data_parallel import DataParallel, wrap_data_parallel
from mpo_megatron.training.optimizer import build_optimizer
from mpo_megatron.training.profiling import Mark
from mpo_megatron.training.step import objective_pass, response_logps

OBJECTIVE = partial(wmpo, beta=0.1, alpha=0.1)


def random_groups(
    count: int, prompt: int, response: int, n: int, vocab_size: int, seed: int = 0
) -> list[TokenizedGroup]:
    """Groups of one shape with random tokens and scores."""
    random = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        scores = random.normal(size=n)
        responses = list(random.integers(0, vocab_size, (n, response)))
        tokens = random.integers(0, vocab_size, prompt)
        groups.append(TokenizedGroup(str(number), tokens, responses, scores, scores > scores.mean()))
    return groups


def fastest(device: torch.device) -> ModelOptions:
    """bf16 with the layers and kernels that a run takes by itself on a GPU; float32 on a CPU."""
    if device.type != "cuda":
        return ModelOptions()
    dtype = torch.bfloat16
    return ModelOptions(
        dtype=dtype,
        transformer_engine=uses_transformer_engine("auto", device, dtype),
        attention_backend=choose_backend("auto", device, dtype),
        head_backend=choose_head("auto", device, dtype),
    )


@dataclass
class Job:
    """A model with optimizer on this rank, which is data parallel to any others unless it says how they share it.

    `mark` puts names on what a step does, for a profile.
    """

    architecture: Architecture
    layout: ParallelLayout
    options: ModelOptions
    chunks: list[Any]
    optimizer: Any
    mark: Mark = nullcontext

    @classmethod
    def start(
        cls,
        model: Path | Architecture,
        threads: int,
        *,
        accelerator: str = "cpu",
        options: ModelOptions | None = None,
        distributed_optimizer: bool = False,
        tp: int = 1,
        cp: int = 1,
    ) -> "Job":
        """Build the model of a Hugging Face folder, or one of random weights.

        Args:
            accelerator: `gpu`, `cpu`, or `auto`, as in `trainer.accelerator`.
            options: None for what is `fastest`.
            tp: ranks that share the tensors, and with them the sequence.
            cp: ranks that share a row.
        """
        torch.set_num_threads(threads)
        layout = initialize(choose_device(accelerator), tp=tp, cp=cp)
        options = replace(options or fastest(layout.device), sequence_parallel=tp > 1)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        architecture = model if isinstance(model, Architecture) else read_architecture(model)
        chunks = build_model(architecture, layout, options)
        if isinstance(model, Architecture):
            with torch.no_grad():
                for parameter in chunks[0].parameters():
                    parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        else:
            load_hf_weights([unwrap(chunks[0])], architecture, layout, model)
        chunks = wrap_data_parallel(chunks, DataParallel(distributed_optimizer))
        optim = OptimConfig(distributed=distributed_optimizer)
        optimizer = build_optimizer(chunks, optim, 1.0, options.dtype)
        return cls(architecture, layout, options, chunks, optimizer)

    def settings(self, threads: int) -> dict[str, Any]:
        """What a report says of where and how the model ran."""
        return {
            "on": measured_on(self.layout.device),
            "threads": threads,
            "precision": str(self.options.dtype).removeprefix("torch."),
            "layers of": "Transformer Engine" if self.options.transformer_engine else "Megatron-core",
            "attention": self.options.attention_backend,
            "head": self.options.head_backend,
        }

    def source(
        self, groups: Sequence[TokenizedGroup], *, max_tokens: int, shared_prompt: bool = True
    ) -> RowSource:
        """The groups' rows on this rank."""
        layout = self.layout
        source = RowSource(
            GroupList(groups),
            max_tokens=max_tokens,
            alignment=row_alignment(self.options.fp8, layout.tp, layout.device) * layout.cp,
            cost=self.architecture.cost_model,
            shared_prompt=shared_prompt,
            data_parallel=(layout.dp, layout.dp_rank),
            context=(layout.cp, layout.cp_rank),
            device=layout.device,
        )
        # As it is when a step is made, not now.
        source.mark = lambda name: self.mark(name)
        return source

    def reference(self, source: RowSource) -> Tensor:
        """Log-probs of all responses of a source under the present weights."""
        step = source.step(range(len(source.dataset)))
        return response_logps(self.chunks, [step], int(source.dataset.response_offsets[-1]), self.layout)

    def gradients(self, source: RowSource, positions: Sequence[int], reference: Tensor) -> float:
        """Forward and backward of one step. Returns the loss."""
        with self.mark("optimizer"):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        step = source.step(positions)
        return objective_pass(self.chunks, step, OBJECTIVE, reference, self.layout, forward_only=False)[
            "loss"
        ]

    def train(self, source: RowSource, positions: Sequence[int], reference: Tensor) -> float:
        """One whole training step. Returns its loss."""
        loss = self.gradients(source, positions, reference)
        with self.mark("optimizer"):
            self.optimizer.step()
        return loss
