"""A model on one CPU rank, and training steps on groups in memory: what the benchmarks time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from mpo_megatron.config import OptimConfig
from mpo_megatron.conversion.load import load_hf_weights
from mpo_megatron.data import GroupList, TokenizedGroup
from mpo_megatron.model.architecture import Architecture, architecture_of, read_architecture
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap
from mpo_megatron.objectives.mpo import wmpo
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import ParallelLayout, initialize
from mpo_megatron.scheduling.rows import RowSource
from mpo_megatron.training.optimizer import build_optimizer, wrap_data_parallel
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


def small_llama(*, hidden: int, layers: int, vocab: int, max_positions: int) -> Architecture:
    """A Llama of the usual proportions: heads of 64, half as many key-value heads, feed-forward 3 x hidden."""
    from transformers import LlamaConfig

    return architecture_of(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            vocab_size=vocab,
            max_position_embeddings=max_positions,
            tie_word_embeddings=False,
        )
    )


@dataclass
class Job:
    """A model in float32 with optimizer on the one rank of this process."""

    architecture: Architecture
    layout: ParallelLayout
    chunks: list[Any]
    optimizer: Any

    @classmethod
    def start(cls, model: Path | Architecture, threads: int) -> "Job":
        """Build the model of a Hugging Face folder, or one of random weights."""
        torch.set_num_threads(threads)
        layout = initialize(choose_device("cpu"))
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        architecture = model if isinstance(model, Architecture) else read_architecture(model)
        chunks = build_model(architecture, layout, ModelOptions())
        if isinstance(model, Architecture):
            with torch.no_grad():
                for parameter in chunks[0].parameters():
                    parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        else:
            load_hf_weights([unwrap(chunks[0])], architecture, layout, model)
        chunks = wrap_data_parallel(chunks, distributed_optimizer=False)
        optimizer = build_optimizer(chunks, OptimConfig(distributed=False), 1.0, torch.float32)
        return cls(architecture, layout, chunks, optimizer)

    def source(
        self, groups: Sequence[TokenizedGroup], *, max_tokens: int, shared_prompt: bool = True
    ) -> RowSource:
        """The groups' rows on this rank."""
        return RowSource(
            GroupList(groups),
            max_tokens=max_tokens,
            alignment=8,
            cost=self.architecture.cost_model,
            shared_prompt=shared_prompt,
            device=self.layout.device,
        )

    def reference(self, source: RowSource) -> Tensor:
        """Log-probs of all responses of a source under the present weights."""
        step = source.step(range(len(source.dataset)))
        return response_logps(self.chunks, [step], int(source.dataset.response_offsets[-1]), self.layout)

    def gradients(self, source: RowSource, positions: Sequence[int], reference: Tensor) -> float:
        """Forward and backward of one step. Returns the loss."""
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
        self.optimizer.step()
        return loss
