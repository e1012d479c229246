"""Machines as facts, to be changed by `dataclasses.replace`."""

from mpo_megatron.runtime.facts import Facts, Gpu, Library

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85.0)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 85.0)
V100 = Gpu("Tesla V100-SXM2-32GB", (7, 0), 34.0)

LIBRARIES = {
    "megatron-core": Library("megatron-core 0.19.2"),
    "nemo": Library("nemo-toolkit 3.0.0"),
    "transformer-engine": Library("Transformer Engine 2.16.0"),
    "flash-attn": Library("flash-attn 2.7.4"),
    "flash-attn 3": Library("flash-attn 3", "is not installed"),
    "torch varlen": Library("torch 2.13.0"),
    "apex": Library("apex 0.1"),
    "triton": Library("triton 3.7.1"),
}

# A node of eight H100s in the container, which lacks nothing.
NODE = Facts(
    python=(3, 12),
    torch=Library("torch 2.13.0"),
    torch_cuda=(13, 0),
    torch_archs=("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"),
    nccl="2.30.4",
    libraries=LIBRARIES,
    driver="580.95.05",
    driver_cuda=(13, 0),
    devices=8,
    gpus=(H100,) * 8,
    nvlink=True,
    infiniband=("mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR)",),
    cores=96,
    memory_gb=2000,
    shm_gb=500,
    disks={"/scratch": 20000.0},
    environment={
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    },
)
