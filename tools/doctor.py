"""Says what this machine has for a run, what it lacks, what runs instead, what that costs, and what mends it.

    python tools/doctor.py [--cache FOLDER] [--output FOLDER]

Exit status: 0 if a run is possible, 1 if not, or not on the GPUs that are here. Needs no torch.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mpo_megatron.runtime.choices import attention  # noqa: E402
from mpo_megatron.runtime.doctor import judge  # noqa: E402
from mpo_megatron.runtime.facts import Facts, dotted  # noqa: E402
from mpo_megatron.runtime.findings import NOTE, SLOWER, STOP, Finding  # noqa: E402
from mpo_megatron.runtime.probe import probe  # noqa: E402
from mpo_megatron.runtime.quiet import quiet_third_parties  # noqa: E402

_TITLES = {STOP: "stops a run", SLOWER: "costs something", NOTE: "to know"}


def main(arguments: list[str] | None = None) -> int:
    """Print facts and findings. Returns the exit status."""
    parser = argparse.ArgumentParser(description="What this machine has for a run, and what it lacks.")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/mpo_megatron"), help="model.data.cache_dir"
    )
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="exp_manager.exp_dir")
    given = parser.parse_args(arguments)
    quiet_third_parties()
    facts = probe([given.cache, given.output])
    findings = judge(facts)
    for line in [*described(facts), "", *advice(findings)]:
        print(line)
    return int(any(finding.level == STOP for finding in findings))


def described(facts: Facts) -> list[str]:
    """The facts, a line each."""
    lines = [
        ("python", dotted(facts.python)),
        ("torch", f"{facts.torch}, {_cuda(facts)}"),
        ("driver", _driver(facts)),
        ("NCCL", facts.nccl or "none"),
        *((name, str(library)) for name, library in facts.libraries.items()),
    ]
    if facts.torch.problem is None:
        lines += [("layers", _layers(facts)), ("attention", _attention(facts))]
    for number, gpu in enumerate(facts.gpus):
        what = f"{gpu.name}, {gpu.memory_gb:.0f} GB, compute capability {dotted(gpu.capability)}"
        lines.append((f"GPU {number}", what))
    lines += [
        ("GPUs", _links(facts) if facts.gpus else "none"),
        *(("InfiniBand", port) for port in facts.infiniband or ("none",)),
        ("CPU", f"{facts.cores} cores, {facts.memory_gb:.0f} GB"),
        ("/dev/shm", "not known" if facts.shm_gb is None else f"{facts.shm_gb:.3g} GB free"),
    ]
    for folder, free in facts.disks.items():
        lines.append((folder, free if isinstance(free, str) else f"{free:.3g} GB free"))
    lines += [("environment", f"{name}={value}") for name, value in facts.environment.items()]
    width = max(len(name) for name, _ in lines)
    return [f"{name:{width}}  {value}" for name, value in lines] + facts.topology.splitlines()


def advice(findings: list[Finding]) -> list[str]:
    """The findings, by level."""
    lines: list[str] = []
    for level, title in _TITLES.items():
        of_level = [finding for finding in findings if finding.level == level]
        if of_level:
            lines += [f"{title}:", *(line for finding in of_level for line in _told(finding))]
    return lines or ["nothing is missing"]


def _told(finding: Finding) -> list[str]:
    parts = (("instead", finding.instead), ("cost", finding.cost), ("mend", finding.fix))
    return [f"  {finding.problem}", *(f"      {name:8}{text}" for name, text in parts if text)]


def _cuda(facts: Facts) -> str:
    if facts.torch.problem is not None:
        return "so its GPUs cannot be asked"
    return f"built for CUDA {dotted(facts.torch_cuda)}" if facts.torch_cuda else "built for CPUs"


def _driver(facts: Facts) -> str:
    runs = f"CUDA up to {dotted(facts.driver_cuda)}" if facts.driver_cuda else "CUDA not known"
    return f"{facts.driver}, {runs}" if facts.driver or facts.driver_cuda else "none"


def _layers(facts: Facts) -> str:
    if facts.gpus and facts.has("transformer-engine"):
        fused = "norms, rotary embedding, weight gradients, optimizer and gradient norm fused"
        return f"of {facts.libraries['transformer-engine'].name} in bf16: {fused}"
    optimizer = "apex's optimizer fused" if facts.gpus and facts.has("apex") else "torch's fused AdamW"
    return f"Megatron-core's own: {optimizer}; norms, rotary embedding and weight gradients not fused"


def _attention(facts: Facts) -> str:
    if not facts.gpus:
        return "sdpa, of torch"
    backend, library = attention(min(gpu.capability for gpu in facts.gpus), facts.libraries)
    return f"{backend}, of {library}"


def _links(facts: Facts) -> str:
    peers = (
        f"{len(facts.without_peer)} pairs without peer access"
        if facts.without_peer
        else "peer access between all"
    )
    nvlink = {True: "NVLink", False: "no NVLink", None: "NVLink not known"}[facts.nvlink]
    return f"{len(facts.gpus)}, {peers}, {nvlink}" if len(facts.gpus) > 1 else "1"


if __name__ == "__main__":
    sys.exit(main())
