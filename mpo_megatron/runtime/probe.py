"""Finds the facts of this machine. Any question may fail, and torch be missing or broken: the others are asked."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mpo_megatron.runtime.facts import Facts, Gpu, Library, Pair

# By name, the function of `capabilities` that tries it.
LIBRARIES = {
    "megatron-core": "megatron_core",
    "nemo": "nemo",
    "transformer-engine": "transformer_engine",
    "flash-attn": "flash_attention",
    "flash-attn 3": "flash_attention_3",
    "torch varlen": "torch_varlen_attention",
    "apex": "apex",
    "triton": "triton",
}
_ENVIRONMENT = re.compile(
    r"CUDA_(DEVICE_MAX_CONNECTIONS|VISIBLE_DEVICES|LAUNCH_BLOCKING)|PYTORCH_(CUDA_)?ALLOC_CONF|(TORCH_)?NCCL_\w+"
    r"|NVTE_(FLASH|FUSED)_ATTN|GLOO_SOCKET_IFNAME|OMP_NUM_THREADS"
)
_T = TypeVar("_T")


def probe(
    folders: Iterable[Path] = (), root: Path = Path("/"), libraries: Sequence[str] = tuple(LIBRARIES)
) -> Facts:
    """Ask this machine.

    Args:
        folders: whose free space counts.
        root: of the file system, with /proc, /sys and /dev.
        libraries: which to try: it imports them.
    """
    torch, problem = _torch()
    driver = _tried(lambda: (root / "proc/driver/nvidia/version").read_text(), "")
    found = re.search(r"(?:Kernel Module|x86_64|aarch64)\s+([\d.]+)", driver)
    topology = _output("nvidia-smi", "topo", "-m")
    return Facts(
        python=sys.version_info[:2],
        torch=Library(f"torch {torch.__version__}" if torch else "torch", problem),
        torch_cuda=_pair(getattr(getattr(torch, "version", None), "cuda", None)),
        torch_archs=tuple(_tried(lambda: torch.cuda.get_arch_list(), [])),
        nccl=_tried(lambda: ".".join(map(str, torch.cuda.nccl.version())), None),
        libraries={name: _library(name) for name in libraries} if torch else {},
        driver=found[1] if found else None,
        driver_cuda=_tried(_driver_cuda, None),
        devices=len(
            [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
        ),
        gpus=tuple(_tried(lambda: _gpus(torch), [])),
        without_peer=tuple(_tried(lambda: _without_peer(torch), [])),
        nvlink=bool(re.search(r"\bNV\d+\b", topology)) if topology else None,
        topology=topology,
        infiniband=tuple(_infiniband(root / "sys/class/infiniband")),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=_tried(lambda: _memory(root / "proc/meminfo"), 0.0),
        shm_gb=_tried(lambda: shutil.disk_usage(root / "dev/shm").free / 1e9, None),
        disks={str(folder): _space(folder) for folder in folders},
        environment={
            name: value for name, value in sorted(os.environ.items()) if _ENVIRONMENT.fullmatch(name)
        },
    )


def _tried(ask: Callable[[], _T], otherwise: _T) -> _T:
    """The answer, or `otherwise` where the question itself fails: there is no such file, no driver, no torch."""
    try:
        return ask()
    except Exception:
        return otherwise


def _torch() -> tuple[Any, str | None]:
    """torch, or why there is none. It is asked to compute: a broken build may import."""
    try:
        import torch

        torch.ones(2).sum().item()
    except ModuleNotFoundError as error:
        return None, "is not installed" if error.name == "torch" else f"cannot be imported ({error})"
    except Exception as error:
        return None, f"cannot be imported ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"
    return torch, None


def _library(name: str) -> Library:
    from mpo_megatron.runtime import capabilities

    library: Library = getattr(capabilities, LIBRARIES[name])()
    return library


def _pair(version: str | None) -> Pair | None:
    """(13, 0) of "13.0"."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def _driver_cuda() -> Pair:
    """The driver's newest CUDA, from its own library; OSError if there is none."""
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if status or not version.value:
        raise OSError(f"cuDriverGetVersion: {status}")
    return version.value // 1000, version.value % 1000 // 10


def _gpus(torch: Any) -> list[Gpu]:
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory / 1e9) for gpu in found]


def _without_peer(torch: Any) -> list[Pair]:
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    return [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]


def _output(*command: str) -> str:
    """What a command prints; "" if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.rstrip()


def _infiniband(folder: Path) -> list[str]:
    """Its ports as "mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR)"."""
    found = []
    for port in sorted(folder.glob("*/ports/*")):
        state, rate = (_tried((port / name).read_text, "unknown").strip() for name in ("state", "rate"))
        found.append(f"{port.parents[1].name} port {port.name}: {state.partition(': ')[2] or state}, {rate}")
    return found


def _memory(meminfo: Path) -> float:
    found = re.search(r"MemTotal:\s+(\d+) kB", meminfo.read_text())
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def _space(folder: Path) -> float | str:
    """Free GB where the folder is or will be; why it cannot be written, if so."""
    there = folder.expanduser().absolute()
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
        return shutil.disk_usage(there).free / 1e9
    except OSError as error:
        return error.strerror or str(error)
