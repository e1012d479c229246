"""Chips by the names that CUDA gives them: peak FLOP/s of dense matrix products, memory, and links.

From NVIDIA's data sheets, whose figures with sparsity are halved: H100 (SXM, PCIe, NVL), H200 (SXM, NVL), H20 (as
sold), A100, GH200, L40S, HGX B200. Links are one way: NVLink's figure halved, PCIe 4 and 5 as 32 and 64 GB/s.
"""

import re
from dataclasses import dataclass

from mpo_megatron.errors import ConfigError

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """A chip.

    Attributes:
        bf16: peak FLOP/s of dense bf16 products.
        fp8: of 8-bit ones; None: it has none.
        memory: bytes that CUDA reports, or the data sheet's where that is not known.
        link: bytes/s that leave it for another chip of its node.
    """

    name: str
    bf16: float
    fp8: float | None
    memory: float
    link: float

    def peak(self, fp8: bool = False) -> float:
        """Peak FLOP/s of the products that a run computes with.

        Raises:
            ConfigError: it has no 8-bit products.
        """
        if not fp8:
            return self.bf16
        if self.fp8 is None:
            raise ConfigError(f"{self.name} has no FP8 products; remove model.fp8")
        return self.fp8


def _gpu(name: str, bf16: float, fp8: float | None, memory: float, link: float) -> Gpu:
    return Gpu(name, bf16 * _TERA, fp8 and fp8 * _TERA, memory * _GIGA, link * _GIGA)


# By a pattern in the device's name, the first that is found. Memory in GB.
GPUS: dict[str, Gpu] = {
    r"H100.*PCIe": _gpu("H100 PCIe", 756, 1513, 80, 64),
    r"H100 NVL": _gpu("H100 NVL", 835, 1671, 94, 300),
    r"H100": _gpu("H100 SXM", 989.4, 1978.9, 85, 450),
    r"H200 NVL": _gpu("H200 NVL", 835, 1671, 141, 450),
    r"GH200": _gpu("GH200", 989.4, 1978.9, 96, 450),
    r"H200": _gpu("H200 SXM", 989.4, 1978.9, 150, 450),
    r"H20\b": _gpu("H20", 148, 296, 96, 450),
    r"A100.*40GB": _gpu("A100 40 GB", 312, None, 42, 300),
    r"A100.*PCIe": _gpu("A100 PCIe", 312, None, 85, 32),
    r"A100": _gpu("A100 SXM", 312, None, 85, 300),
    r"L40S": _gpu("L40S", 362, 733, 48, 32),
    r"B200": _gpu("B200", 2250, 4500, 191, 900),
}
# What leaves a GPU for another node: one 400 Gb/s port for each, as in NVIDIA's DGX H100.
NETWORK = 50 * _GIGA


def find_gpu(name: str) -> Gpu | None:
    """The chip of a device name (`torch.cuda.get_device_name`, or as people write it); None: not in the table."""
    if re.search(r"GB200", name):  # another board: its own clocks, and two chips
        return None
    return next((gpu for pattern, gpu in GPUS.items() if re.search(pattern, name, re.IGNORECASE)), None)


def known_gpu(name: str) -> Gpu:
    """The same.

    Raises:
        ConfigError: it is not in the table.
    """
    gpu = find_gpu(name)
    if gpu is None:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise ConfigError(f"GPU {name!r} is not in the table; choose one of {known}")
    return gpu


@dataclass(frozen=True)
class Machine:
    """So many GPUs of a kind."""

    gpu: Gpu
    gpus: int
    per_node: int = 8

    def bandwidth(self, reach: int) -> float:
        """Bytes/s that leave a GPU for the others of a group that lies within `reach` consecutive ranks."""
        return self.gpu.link if reach <= self.per_node else min(self.gpu.link, NETWORK)
