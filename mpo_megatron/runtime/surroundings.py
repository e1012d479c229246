"""What the surroundings of a machine's GPUs mean for a run: links, room, settings. Pure, as `doctor`."""

from collections.abc import Iterator

from mpo_megatron.runtime.facts import Facts
from mpo_megatron.runtime.findings import NOTE, SLOWER, STOP, Finding

_SHM_GB_PER_GPU = 1.0
# Of bf16 training: weights 2, float32 masters 4, Adam's two averages 8.
_CHECKPOINT_BYTES = 14


def links(facts: Facts) -> Iterator[Finding]:
    """What joins the GPUs, within the machine and beyond."""
    if len(facts.gpus) > 1 and facts.without_peer:
        a, b = facts.without_peer[0]
        yield Finding(
            SLOWER,
            f"{len(facts.without_peer)} pairs of GPUs, such as {a} and {b}, cannot read each other's memory",
            "NCCL goes through the host's memory",
            "every collective of tensor parallelism waits for it",
            "look at nvidia-smi topo -p2p r; IOMMU or ACS of the PCIe switches forbid it, or the virtual machine does",
        )
    elif len(facts.gpus) > 1 and facts.nvlink is False:
        yield Finding(
            SLOWER,
            "no NVLink joins the GPUs",
            "NCCL goes over PCIe",
            "some 25 to 50 GB/s where NVLink has 300 and more each way, which tensor parallelism feels most",
            "prefer pipeline to tensor parallelism (model.pipeline_model_parallel_size)",
        )
    down = [port for port in facts.infiniband if "ACTIVE" not in port]
    if facts.gpus and not facts.infiniband:
        yield Finding(
            NOTE,
            "there is no InfiniBand or RoCE device",
            "several nodes talk over TCP",
            "some GB/s between nodes where InfiniBand has 50 a GPU",
            "nothing, on one node; in a container, give it /dev/infiniband",
        )
    elif facts.gpus and down:
        yield Finding(
            SLOWER,
            f"{len(down)} of {len(facts.infiniband)} InfiniBand ports are not active, such as {down[0]}",
            "NCCL takes the others",
            "their part of the bandwidth between nodes",
            "look at ibstat and the cables, or leave them out with NCCL_IB_HCA",
        )


def room(facts: Facts) -> Iterator[Finding]:
    """Memory and disks."""
    needed = max(1, len(facts.gpus)) * _SHM_GB_PER_GPU
    if facts.gpus and facts.shm_gb is not None and facts.shm_gb < needed:
        yield Finding(
            SLOWER,
            f"/dev/shm has {facts.shm_gb:.2g} GB free, below {needed:g} GB for {len(facts.gpus)} GPUs",
            "NCCL takes it for its buffers",
            "it stops where it does not get it",
            "docker run --ipc=host, or --shm-size=16g",
        )
    for folder, free in facts.disks.items():
        if isinstance(free, str):
            yield Finding(
                STOP,
                f"{folder} cannot be written ({free})",
                "",
                "no run",
                "give another folder (model.data.cache_dir, exp_manager.exp_dir)",
            )
        elif facts.gpus and free < 8 * _CHECKPOINT_BYTES:
            yield Finding(
                NOTE,
                f"{folder} has {free:.3g} GB free",
                "",
                f"a checkpoint takes {_CHECKPOINT_BYTES} bytes a parameter, {8 * _CHECKPOINT_BYTES} GB for 8B",
                "make room, or give another folder",
            )


def settings(facts: Facts) -> Iterator[Finding]:
    """Environment variables that cost speed, or the end of a run that hangs."""
    if not facts.gpus:
        return
    env = facts.environment
    connections, newest = env.get("CUDA_DEVICE_MAX_CONNECTIONS"), min(gpu.capability for gpu in facts.gpus)
    if len(facts.gpus) > 1 and connections != "1" and newest < (10, 0):
        yield Finding(
            SLOWER,
            f"CUDA_DEVICE_MAX_CONNECTIONS is {connections or 'not set'}",
            "GPUs before Blackwell order kernels of several streams as they like",
            "tensor and context parallelism may not overlap with products",
            "export CUDA_DEVICE_MAX_CONNECTIONS=1 where tensor or context parallelism is above 1",
        )
    allocator = env.get("PYTORCH_ALLOC_CONF", env.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    if "expandable_segments:True" not in allocator:
        yield Finding(
            SLOWER,
            "PYTORCH_CUDA_ALLOC_CONF has no expandable_segments:True",
            "torch's allocator keeps blocks of fixed sizes",
            "rows have another length at every step, and memory goes to pieces",
            "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        )
    for name, value, problem, cost in (
        ("CUDA_LAUNCH_BLOCKING", "1", "the host waits for each kernel", "several times the time of a step"),
        (
            "NCCL_P2P_DISABLE",
            "1",
            "GPUs of a machine go through the host's memory",
            "tensor parallelism most of all",
        ),
        (
            "NCCL_IB_DISABLE",
            "1",
            "nodes talk over TCP",
            "some GB/s between nodes where InfiniBand has 50 a GPU",
        ),
        ("NCCL_DEBUG", "TRACE", "NCCL writes each call to the log", "time and disk"),
        (
            "TORCH_NCCL_ASYNC_ERROR_HANDLING",
            "0",
            "ranks wait on for one that has failed",
            "hours of the whole job",
        ),
    ):
        if env.get(name) == value:
            yield Finding(SLOWER, f"{name}={value}", problem, cost, "unset it")
    if env.get("NVTE_FLASH_ATTN") == env.get("NVTE_FUSED_ATTN") == "0":
        yield Finding(
            SLOWER,
            "NVTE_FLASH_ATTN=0 and NVTE_FUSED_ATTN=0",
            "Transformer Engine's attention is unfused",
            "scores are stored: 2 bytes x heads x tokens squared",
            "unset one",
        )
