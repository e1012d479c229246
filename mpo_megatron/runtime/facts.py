"""What a machine is and has, as plain values: `probe` finds them, `doctor` judges them. Imports nothing but Python."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# (major, minor): of a compute capability, or of a version of CUDA or Python.
Pair = tuple[int, int]


def dotted(pair: Pair) -> str:
    """ "9.0" of (9, 0)."""
    return f"{pair[0]}.{pair[1]}"


@dataclass(frozen=True)
class Library:
    """A library as it is here.

    Attributes:
        name: for people, with its version if it is there.
        problem: why it cannot be used, as the end of a sentence; None: it can.
        version: its first two numbers; (0, 0) if it is not known.
    """

    name: str
    problem: str | None = None
    version: Pair = (0, 0)

    def __str__(self) -> str:
        return self.name if self.problem is None else f"{self.name} {self.problem}"


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    capability: Pair
    memory_gb: float


@dataclass(frozen=True)
class Facts:
    """A machine and its software.

    Attributes:
        torch_cuda: that torch was built with; None: a build for CPUs.
        torch_archs: what torch's kernels were compiled for, as in torch.cuda.get_arch_list().
        libraries: by the names in `probe.LIBRARIES`.
        driver_cuda: the newest CUDA that the driver runs.
        devices: NVIDIA devices of this machine, whether torch sees them or not.
        without_peer: pairs of GPUs that cannot read each other's memory.
        nvlink: whether GPUs are joined by it; None: not known.
        topology: nvidia-smi's table, or "".
        infiniband: its ports, with state and rate.
        shm_gb: free in /dev/shm.
        disks: free GB by folder, or why it cannot be written.
        environment: of what steers torch, NCCL and Transformer Engine.
    """

    python: Pair = (3, 11)
    torch: Library = Library("torch")
    torch_cuda: Pair | None = None
    torch_archs: tuple[str, ...] = ()
    nccl: str | None = None
    libraries: Mapping[str, Library] = field(default_factory=dict)
    driver: str | None = None
    driver_cuda: Pair | None = None
    devices: int = 0
    gpus: tuple[Gpu, ...] = ()
    without_peer: tuple[Pair, ...] = ()
    nvlink: bool | None = None
    topology: str = ""
    infiniband: tuple[str, ...] = ()
    cores: int = 1
    memory_gb: float = 0
    shm_gb: float | None = None
    disks: Mapping[str, float | str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether a library can be used."""
        return name in self.libraries and self.libraries[name].problem is None
