"""From facts of machines that are not here to what they mean for a run."""

from dataclasses import replace
from typing import Any

import pytest

from mpo_megatron.runtime.doctor import judge
from mpo_megatron.runtime.facts import Facts, Gpu, Library
from mpo_megatron.runtime.findings import NOTE, SLOWER, STOP, Finding
from tests.helpers.machines import A100, H100, LIBRARIES, NODE, V100

MISSING = {
    name: Library(library.name.rpartition(" ")[0], "is not installed") for name, library in LIBRARIES.items()
}


def only(facts: Facts) -> Finding:
    (finding,) = judge(facts)
    return finding


def without(*names: str, **changes: Any) -> Facts:
    return replace(NODE, libraries={**LIBRARIES, **{name: MISSING[name] for name in names}}, **changes)


def test_a_whole_node_lacks_nothing() -> None:
    assert judge(NODE) == []
    assert judge(replace(NODE, gpus=(A100,) * 8)) == []


@pytest.mark.parametrize(
    ("facts", "level", "problem", "fix"),
    [
        (replace(NODE, python=(3, 10)), STOP, "Python 3.10 is not 3.11, 3.12 or 3.13", "setup_venv"),
        (
            Facts(torch=Library("torch", "is not installed")),
            STOP,
            "torch is not installed",
            "run bash tools/setup_venv.sh, or use the container",
        ),
        (
            Facts(torch=Library("torch", "cannot be imported (OSError: libcudart.so.12)"), devices=8, driver="580"),
            STOP,
            "torch cannot be imported (OSError: libcudart.so.12)",
            "use the container",
        ),
        (
            replace(NODE, libraries={**LIBRARIES, "megatron-core": Library("megatron-core 0.15", "is not from 0.16")}),
            STOP,
            "megatron-core 0.15 is not from 0.16",
            "setup_venv",
        ),
        (
            replace(NODE, gpus=(), devices=0, driver=None, driver_cuda=None),
            SLOWER,
            "there is no NVIDIA GPU",
            "start on a machine with GPUs",
        ),
        (
            replace(NODE, gpus=(), driver="470.82.01", driver_cuda=(11, 4)),
            STOP,
            "driver 470.82.01 runs CUDA up to 11.4, and torch 2.13.0 is built for 13.0",
            "install driver 580 or later, or a torch built for CUDA 11",
        ),
        (replace(NODE, gpus=(), torch_cuda=None), STOP, "torch 2.13.0 is a build for CPUs", "install a CUDA build"),
        (
            replace(NODE, gpus=(), environment={"CUDA_VISIBLE_DEVICES": ""}),
            STOP,
            "CUDA_VISIBLE_DEVICES= hides the GPUs",
            "unset it",
        ),
        (
            replace(NODE, gpus=(), devices=0),
            STOP,
            "driver 580.95.05 is loaded, and no /dev/nvidia0 is here",
            "docker run --gpus all",
        ),
        (replace(NODE, gpus=()), STOP, "torch finds none of 8 NVIDIA devices", "nvidia-fabricmanager"),
        (replace(NODE, gpus=(H100, A100)), SLOWER, "the GPUs differ (NVIDIA A100", "CUDA_VISIBLE_DEVICES"),
        (
            replace(NODE, gpus=(Gpu("NVIDIA R100", (13, 0), 300.0),)),
            NOTE,
            "NVIDIA R100 (compute capability 13.0) is not known here",
            "model.attention_backend",
        ),
        (
            replace(NODE, gpus=(H100,), torch_archs=("sm_70", "sm_80", "sm_100a")),
            STOP,
            "torch 2.13.0 has kernels for sm_70 sm_80 sm_100a, and NVIDIA H100 80GB HBM3 is sm_90",
            "built for it",
        ),
        (replace(NODE, torch_cuda=(13, 3)), NOTE, "driver 580.95.05 runs CUDA up to 13.0, and", "driver of CUDA 13.3"),
        (without("apex"), None, "", ""),
        (without("transformer-engine"), SLOWER, "Transformer Engine is not installed", "transformer-engine[pytorch]"),
        (without("flash-attn"), NOTE, "flash-attn is not installed", "pip install flash-attn"),
        (
            replace(NODE, without_peer=((0, 1), (0, 2))),
            SLOWER,
            "2 pairs of GPUs, such as 0 and 1, cannot read each other's memory",
            "ACS",
        ),
        (replace(NODE, nvlink=False), SLOWER, "no NVLink joins the GPUs", "prefer pipeline"),
        (replace(NODE, infiniband=()), NOTE, "there is no InfiniBand or RoCE device", "/dev/infiniband"),
        (
            replace(NODE, infiniband=(*NODE.infiniband, "mlx5_1 port 1: DOWN, 10 Gb/sec")),
            SLOWER,
            "1 of 2 InfiniBand ports are not active, such as mlx5_1 port 1: DOWN",
            "NCCL_IB_HCA",
        ),
        (replace(NODE, shm_gb=0.067), SLOWER, "/dev/shm has 0.067 GB free, below 8 GB for 8 GPUs", "--ipc=host"),
        (replace(NODE, disks={"/out": 50.0}), NOTE, "/out has 50 GB free", "make room"),
        (
            replace(NODE, disks={"/out": "Permission denied"}),
            STOP,
            "/out cannot be written (Permission denied)",
            "exp_manager.exp_dir",
        ),
    ],
)  # fmt: skip
def test_one_thing_missing(facts: Facts, level: str | None, problem: str, fix: str) -> None:
    if level is None:
        assert judge(facts) == []
        return
    finding = only(facts)
    assert finding.level == level
    assert finding.problem.startswith(problem)
    assert fix in finding.fix
    assert finding.cost
    assert "\n" not in str(finding)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "CUDA_DEVICE_MAX_CONNECTIONS is 8"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": None}, "CUDA_DEVICE_MAX_CONNECTIONS is not set"),
        ({"PYTORCH_CUDA_ALLOC_CONF": None}, "PYTORCH_CUDA_ALLOC_CONF has no expandable_segments:True"),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"},
            "PYTORCH_CUDA_ALLOC_CONF has no expandable_segments:True",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": None, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, None),
        ({"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE=1"),
        ({"NCCL_IB_DISABLE": "1"}, "NCCL_IB_DISABLE=1"),
        ({"NCCL_IB_DISABLE": "0"}, None),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING=1"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "TORCH_NCCL_ASYNC_ERROR_HANDLING=0"),
        ({"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}, "NVTE_FLASH_ATTN=0 and NVTE_FUSED_ATTN=0"),
        ({"NVTE_FLASH_ATTN": "0"}, None),
    ],
)
def test_settings(changes: dict[str, str | None], problem: str | None) -> None:
    environment = {
        name: value for name, value in {**NODE.environment, **changes}.items() if value is not None
    }
    found = judge(replace(NODE, environment=environment))
    assert [finding.problem for finding in found] == ([] if problem is None else [problem])
    assert all(finding.level == SLOWER and finding.fix for finding in found)


def test_blackwell_orders_its_kernels_without_a_setting() -> None:
    blackwell = Gpu("NVIDIA B200", (10, 0), 190.0)
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert judge(replace(NODE, gpus=(blackwell,) * 8, environment=environment)) == []
    assert judge(replace(NODE, gpus=(H100,), environment=environment)) == []


def test_attention_goes_down_step_by_step() -> None:
    """flash-attn, torch's own, Transformer Engine's, and at last scaled_dot_product_attention."""
    old = Library("torch 2.11.0", "is too old; 2.13 is needed")
    libraries = {**LIBRARIES, "flash-attn": MISSING["flash-attn"], "torch varlen": old}
    finding = only(replace(NODE, libraries=libraries))
    assert (finding.level, finding.instead) == (NOTE, "attention is te, of Transformer Engine 2.16.0")
    libraries["transformer-engine"] = MISSING["transformer-engine"]
    layers, attention = judge(replace(NODE, libraries=libraries))
    assert layers.instead == "Megatron-core's own layers"
    assert attention.level == SLOWER
    assert attention.instead == "attention is sdpa"
    assert attention.problem == (
        "flash-attn is not installed, torch 2.11.0 is too old; 2.13 is needed, Transformer Engine is not installed"
    )


def test_apex_counts_where_transformer_engine_is_missing() -> None:
    layers, optimizer = judge(without("transformer-engine", "apex"))
    assert layers.problem == "Transformer Engine is not installed"
    assert optimizer.problem == "apex is not installed"
    assert "torch's fused AdamW" in optimizer.instead
    assert "the apex on PyPI is another package" in optimizer.fix


def test_an_old_gpu_is_told_once() -> None:
    finding = only(replace(NODE, gpus=(V100,) * 8, torch_archs=("sm_70", "sm_90")))
    assert finding.level == SLOWER
    assert finding.problem == "Tesla V100-SXM2-32GB has compute capability 7.0"
    assert "attention is sdpa" in finding.instead


def test_what_stops_a_run_comes_first() -> None:
    facts = replace(without("flash-attn"), disks={"/out": "Read-only file system"}, nvlink=False)
    assert [finding.level for finding in judge(facts)] == [STOP, SLOWER, NOTE]
