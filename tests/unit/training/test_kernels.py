"""The lines on kernels at a run's start: on a GPU, whatever is not there is named with what it costs."""

from dataclasses import replace

import pytest
import torch

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.attention import choose_backend
from mpo_megatron.model.head import choose_head, no_head
from mpo_megatron.model.provider import ModelOptions, uses_transformer_engine
from mpo_megatron.runtime import capabilities
from mpo_megatron.runtime.facts import Library
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.training.kernels import costs, costs_of, kernels
from tests.helpers.machines import LIBRARIES, NODE

GPU = ParallelLayout(0, 8, 0, 2, 1, 1, 1, 4, 1, 0, 0, 0, 0, 0, torch.device("cuda:0"))


def test_a_float32_run_on_a_gpu_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    first, second = kernels(ModelOptions(), GPU, num_heads=32, max_length=4096)
    assert first == (
        "kernels     Megatron-core's own layers (Transformer Engine's products of float32 numbers are in TF32, so it "
        "needs trainer.precision=bf16); attention sdpa (its kernels take 16 bits alone, so it needs "
        "trainer.precision=bf16), which may store scores: up to 1.1 GB for each layer and response of 4096 tokens; "
        "head eager (its products are for bf16, so it needs trainer.precision=bf16)"
    )
    assert second.strip().startswith("CUDA_DEVICE_MAX_CONNECTIONS not set")


def test_what_is_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    options = ModelOptions(torch.bfloat16, transformer_engine=True, attention_backend="varlen")
    first, second = kernels(options, GPU, 32, 4096)
    assert first.startswith(
        "kernels     layers of Transformer Engine, weight gradients fused; attention varlen, of torch 2."
    )
    assert second.strip().startswith("CUDA_DEVICE_MAX_CONNECTIONS=1")
    triton = Library("triton 3.7.1")
    monkeypatch.setattr(capabilities, "triton", lambda: triton)
    options = replace(options, transformer_engine=False, attention_backend="te", head_backend="triton")
    (first, _) = kernels(options, GPU, 32, 4096)
    assert "own layers (Transformer Engine is not installed); attention of Transformer Engine" in first
    assert first.endswith("; head of triton 3.7.1")


def test_a_cpu_run_has_no_choice() -> None:
    assert kernels(ModelOptions(), replace(GPU, device=torch.device("cpu")), 32, 4096) == []


@pytest.mark.parametrize(
    ("device", "dtype", "problem"),
    [
        ("cpu", torch.bfloat16, "Transformer Engine needs a GPU"),
        ("cuda:0", torch.float32, "in TF32, so it needs trainer.precision=bf16"),
        ("cuda:0", torch.bfloat16, "Transformer Engine is not installed"),
    ],
)
def test_layers_that_cannot_run_are_refused_with_the_reason(
    device: str, dtype: torch.dtype, problem: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"transformer_impl=transformer_engine: .*{problem}; mend that, or set"
    ):
        uses_transformer_engine("transformer_engine", torch.device(device), dtype)
    assert not uses_transformer_engine("auto", torch.device(device), dtype)
    assert not uses_transformer_engine("local", torch.device(device), dtype)


def test_float32_on_a_gpu_has_sdpa() -> None:
    gpu = torch.device("cuda:0")
    assert choose_backend("auto", gpu, torch.float32) == "sdpa"
    with pytest.raises(ConfigError, match="attention_backend=varlen: its kernels take 16 bits alone"):
        choose_backend("varlen", gpu, torch.float32)


def test_the_head_is_chosen_by_device_type_and_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an H100 with a Triton that works; then without each of them."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(capabilities, "triton", lambda: Library("triton 3.7.1"))
    assert choose_head("auto", gpu, torch.bfloat16) == choose_head("triton", gpu, torch.bfloat16) == "triton"
    assert choose_head("eager", gpu, torch.bfloat16) == "eager"
    lacks = [(cpu, torch.bfloat16, "it needs a GPU"), (gpu, torch.float32, "its products are for bf16")]
    for device, dtype, problem in lacks:
        assert choose_head("auto", device, dtype) == "eager"
        with pytest.raises(ConfigError, match=f"head_backend=triton: {problem}.*; mend that, or set"):
            choose_head("triton", device, dtype)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert no_head("triton", gpu, torch.bfloat16) == "it needs a GPU of compute capability 8.0 or more"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(capabilities, "triton", lambda: Library("triton", "is not installed"))
    assert no_head("triton", gpu, torch.bfloat16) == "triton is not installed"
    assert choose_head("auto", gpu, torch.bfloat16) == "eager"


def test_the_job_says_what_is_used_instead_and_what_it_costs() -> None:
    assert costs_of(NODE) == []
    missing = {
        name: Library(name, "is not installed")
        for name in ("transformer-engine", "apex", "flash-attn", "triton")
    }
    lines = costs_of(replace(NODE, libraries={**LIBRARIES, **missing}))
    assert len(lines) == 2  # triton is taken only where it is asked for
    assert lines[0].startswith(
        "costs       transformer-engine is not installed; Megatron-core's own layers; no FP8, and"
    )
    assert lines[1].startswith(
        "costs       apex is not installed; torch's fused AdamW, and gradient norms tensor by "
    )


def test_the_job_says_why_it_runs_on_the_cpu() -> None:
    (line,) = costs_of(replace(NODE, gpus=(), driver="470.82.01", driver_cuda=(11, 4)))
    assert line.startswith(
        "costs       driver 470.82.01 runs CUDA up to 11.4, and torch 2.13.0 is built for 13.0; the run takes the CPU; "
        "some 0.2 groups"
    )
    assert line.endswith("; install driver 580 or later, or a torch built for CUDA 11")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_cpu_that_was_asked_for_costs_nothing() -> None:
    on_cpu = replace(GPU, device=torch.device("cpu"))
    assert costs("cpu", on_cpu) == []
    (line,) = costs("auto", on_cpu)
    assert line.startswith("costs       there is no NVIDIA GPU; the run takes the CPU")
