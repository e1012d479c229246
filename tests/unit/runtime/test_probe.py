"""The facts of this machine, and of a file system that looks like a GPU node's."""

import os
import sys
from pathlib import Path

import pytest
import torch

from mpo_megatron.runtime.probe import LIBRARIES, probe


def write(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_this_machine(tmp_path: Path) -> None:
    facts = probe([tmp_path / "not" / "yet"])
    assert facts.python == sys.version_info[:2]
    assert (facts.torch.name, facts.torch.problem) == (f"torch {torch.__version__}", None)
    assert facts.libraries.keys() == LIBRARIES.keys()
    assert facts.has("megatron-core")
    assert facts.has("nemo")
    assert len(facts.gpus) == torch.cuda.device_count()
    assert facts.cores == len(os.sched_getaffinity(0))
    assert facts.memory_gb > 1
    free = facts.disks[str(tmp_path / "not" / "yet")]
    assert isinstance(free, float)
    assert free > 0
    assert not (tmp_path / "not").exists()


def test_a_node_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U16)\n",
    )
    write(tmp_path, "proc/meminfo", "MemTotal:       2113535652 kB\nMemFree: 1 kB\n")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        write(tmp_path, f"dev/{name}")
    write(tmp_path, "dev/shm/file")
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        write(tmp_path, f"sys/class/infiniband/{device}/ports/1/state", f"{state}\n")
        write(tmp_path, f"sys/class/infiniband/{device}/ports/1/rate", "400 Gb/sec (4X NDR)\n")
    bin_folder = tmp_path / "bin"
    write(
        bin_folder,
        "nvidia-smi",
        "#!/bin/sh\nprintf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X \\n'\n",
    )
    (bin_folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    facts = probe(root=tmp_path, libraries=())
    assert facts.driver == "580.95.05"
    assert facts.devices == 2
    assert facts.nvlink is True
    assert facts.topology.splitlines()[1] == "GPU0\t X \tNV18"
    assert facts.infiniband == (
        "mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR)",
        "mlx5_1 port 1: DOWN, 400 Gb/sec (4X NDR)",
    )
    assert facts.memory_gb == pytest.approx(2164.26, abs=0.01)
    assert facts.libraries == {}
    assert facts.environment["NCCL_IB_HCA"] == "mlx5"
    assert facts.environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_nothing_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = probe(root=tmp_path, libraries=())
    assert (facts.driver, facts.devices, facts.nvlink, facts.infiniband) == (None, 0, None, ())
    assert facts.shm_gb is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    assert probe([below], libraries=()).disks[str(below)] == "Not a directory"
