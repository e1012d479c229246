"""Peaks of chips, and what is said where there is none."""

import torch
import torch.distributed as dist

from mpo_megatron.runtime.peak import peak_memory, product_rate
from mpo_megatron.training.throughput import gpu_peak

H100 = "NVIDIA H100 80GB HBM3"


def test_the_peak_is_that_of_the_products() -> None:
    assert gpu_peak(H100, torch.bfloat16, fp8=False) == (
        989.4e12,
        "989 TFLOP/s of H100 SXM, bf16 without sparsity",
    )
    assert gpu_peak(H100, torch.bfloat16, fp8=True)[0] == 1978.9e12


def test_an_unknown_peak_is_said_to_be_so() -> None:
    peak, said = gpu_peak("NVIDIA GeForce RTX 3090", torch.bfloat16, fp8=False)
    assert peak is None
    assert "not known of NVIDIA GeForce RTX 3090; mfu is left out" in said
    assert gpu_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16, fp8=True)[0] is None
    assert gpu_peak(H100, torch.float32, fp8=False)[0] is None


def test_a_cpu_rank_measures_its_own() -> None:
    state = torch.get_rng_state()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rate = product_rate(torch.float32)
    finally:
        dist.destroy_process_group()
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.get_rng_state(), state)


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**24)  # more than the process has ever had
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) >= held.nbytes
