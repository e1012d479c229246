"""Parameters by formula against those of the real model, of every rank, on the meta device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from mpo_megatron.model.architecture import Architecture, architecture_of
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap
from mpo_megatron.planning.parameters import Parameters, buffers, stage_parameters
from mpo_megatron.planning.run import Run
from tests.helpers.fake_ranks import as_rank

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
# Tensor parallel, pipeline stages, chunks of each, expert parallel.
CASES = [
    ("Llama-3.1-8B", 1, 1, 1, 1),
    ("Llama-3.1-8B", 4, 2, 2, 1),
    ("Llama-3.3-70B", 4, 8, 1, 1),
    ("Mistral-7B-v0.3", 2, 2, 1, 1),
    ("Qwen2.5-7B", 2, 2, 1, 1),
    ("Qwen2.5-32B", 4, 4, 2, 1),
    ("Qwen3-8B", 2, 1, 1, 1),
    ("Qwen3-32B", 8, 2, 1, 1),
    ("Qwen3-30B-A3B", 1, 1, 1, 8),
    ("Qwen3-30B-A3B", 2, 2, 1, 4),
]


def read(name: str, tied: bool) -> Architecture:
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json", tie_word_embeddings=tied)
    return architecture_of(config, name)


def held(parameters: list[torch.nn.Parameter]) -> tuple[list[int], list[int], int]:
    """(dense, experts, replicated), as in Parameters."""
    dense = [p for p in parameters if getattr(p, "allreduce", True)]
    copies = [p for p in dense if not getattr(p, "tensor_model_parallel", False)]
    experts = [p.numel() for p in parameters if not getattr(p, "allreduce", True)]
    return [p.numel() for p in dense], experts, sum(p.numel() for p in copies)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("name", "tp", "pp", "vpp", "ep"), CASES)
def test_every_rank_has_what_was_counted(
    name: str, tp: int, pp: int, vpp: int, ep: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number by number, in Megatron's order, experts apart from the rest."""
    # Megatron sums copies of an embedding up, and experts have a stream of their own, on the GPU.
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    a = read(name, tied)
    run = Run(tp=tp, pp=pp, vpp=vpp, dp=ep, ep=ep, sequence_parallel=tp > 1)
    for rank in range(0, tp * pp * ep, tp * ep):  # one of each stage
        with as_rank(rank, tp, pp, vpp, ep) as layout, torch.device("meta"):
            options = ModelOptions(dtype=torch.bfloat16, sequence_parallel=tp > 1)
            chunks: list[Any] = build_model(a, layout, options)
        planned = stage_parameters(a, run, layout.pp_rank)
        assert len(planned) == len(chunks)
        for chunk, expected in zip(chunks, planned, strict=True):
            dense, experts, replicated = held(list(unwrap(chunk).parameters()))
            assert sorted(expected.dense) == sorted(dense)
            assert sorted(expected.experts) == sorted(experts)
            assert expected.replicated == replicated
            assert expected.count == sum(p.numel() for p in chunk.parameters())


def test_of_a_tied_embedding_two_stages_hold_one() -> None:
    first, last = (
        stage_parameters(read("Qwen3-8B", True), Run(pp=2), stage)[0].shared_embedding for stage in (0, 1)
    )
    assert first == 0
    assert last is not None
    assert stage_parameters(read("Qwen3-8B", True), Run(), 0)[0].shared_embedding is None


def test_buffers_are_padded_as_megatron_pads_them() -> None:
    """By hand: 65 begins at 0 of the reversed order, 10 at 128; 138 elements end at lcm(128, 3)."""
    parameters = Parameters(dense=(10, 65), experts=(), replicated=0, shared_embedding=None)
    assert buffers(parameters, Run(dp=3)) == (384, 0)
    assert buffers(parameters, Run(dp=3, distributed_optimizer=False)) == (75, 0)
    shared = Parameters(dense=(10, 65), experts=(1,), replicated=0, shared_embedding=0)
    assert buffers(shared, Run(dp=2)) == (256, 128)
