"""What the facts of a machine mean for a run: what is missing, what runs instead, what that costs, and what mends it.

Pure: facts in, findings out. The main job prints what concerns it; tools/doctor.py prints all.
"""

import re
from collections.abc import Iterator

from mpo_megatron.runtime.choices import attention
from mpo_megatron.runtime.facts import Facts, Pair, dotted
from mpo_megatron.runtime.findings import NOTE, SLOWER, STOP, Finding
from mpo_megatron.runtime.surroundings import links, room, settings

_KNOWN = {8: "Ampere or Ada", 9: "Hopper", 10: "Blackwell", 11: "Blackwell", 12: "Blackwell"}
# The first driver branch that runs each major CUDA version, for data-center GPUs:
# docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_DRIVERS = {11: "450", 12: "525", 13: "580"}


def judge(facts: Facts) -> list[Finding]:
    """All findings, those that stop a run first."""
    found = [
        *software(facts),
        *devices(facts),
        *kernels(facts),
        *links(facts),
        *room(facts),
        *settings(facts),
    ]
    return sorted(found, key=lambda finding: (STOP, SLOWER, NOTE).index(finding.level))


def software(facts: Facts) -> Iterator[Finding]:
    """What no run can do without."""
    install = "run bash tools/setup_venv.sh, or use the container (Dockerfile)"
    if not (3, 11) <= facts.python <= (3, 13):
        yield Finding(STOP, f"Python {dotted(facts.python)} is not 3.11, 3.12 or 3.13", "", "no run", install)
    if facts.torch.problem is not None:
        yield Finding(STOP, str(facts.torch), "", "no run", install)
    for name in ("megatron-core", "nemo"):
        library = facts.libraries.get(name)
        if library is not None and library.problem is not None:
            yield Finding(STOP, str(library), "", "no run", install)


def devices(facts: Facts) -> Iterator[Finding]:
    """Whether there is a GPU, and whether torch can use it."""
    if facts.torch.problem is not None:
        return
    if facts.gpus:
        names = sorted({gpu.name for gpu in facts.gpus})
        if len(names) > 1:
            yield Finding(
                SLOWER,
                f"the GPUs differ ({', '.join(names)})",
                "a run takes all of them alike",
                "each step waits for the slowest, and the smallest memory counts",
                "choose like ones with CUDA_VISIBLE_DEVICES",
            )
        for name, capability in sorted({(gpu.name, gpu.capability) for gpu in facts.gpus}):
            yield from _gpu(facts, name, capability)
        return
    instead = "the run takes the CPU"
    cost = (
        "some 0.2 groups of four responses a second for 135M parameters on two cores, hopeless for billions"
    )
    if not facts.devices and facts.driver is None:
        yield Finding(
            SLOWER,
            "there is no NVIDIA GPU",
            instead,
            cost,
            "start on a machine with GPUs of compute capability 8.0 or more",
        )
    else:
        problem, fix = _unseen(facts)
        yield Finding(STOP, problem, instead, cost, fix)


def _unseen(facts: Facts) -> tuple[str, str]:
    """Why torch sees no GPU where there is one, and what mends it."""
    built, runs = facts.torch_cuda, facts.driver_cuda
    hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if built is None:
        return f"{facts.torch} is a build for CPUs, and here is a GPU", "install a CUDA build of torch"
    if runs is not None and runs[0] < built[0]:
        wanted = f"driver {_DRIVERS[built[0]]} or later" if built[0] in _DRIVERS else "a newer driver"
        return (
            f"driver {facts.driver} runs CUDA up to {dotted(runs)}, and {facts.torch} is built for {dotted(built)}",
            f"install {wanted}, or a torch built for CUDA {runs[0]}",
        )
    if hidden is not None and not re.match(r"\d|GPU-|MIG-", hidden):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides the GPUs", "unset it"
    if not facts.devices:
        return (
            f"driver {facts.driver} is loaded, and no /dev/nvidia0 is here",
            "give the container or job its GPUs (docker run --gpus all, sbatch --gpus-per-node)",
        )
    return (
        f"torch finds none of {facts.devices} NVIDIA devices",
        "look at nvidia-smi, and on machines with NVSwitch at nvidia-fabricmanager",
    )


def _gpu(facts: Facts, name: str, capability: Pair) -> Iterator[Finding]:
    if facts.torch_archs and not _runs_on(facts.torch_archs, capability):
        yield Finding(
            STOP,
            f"{facts.torch} has kernels for {' '.join(facts.torch_archs)}, and {name} is sm_{capability[0]}"
            f"{capability[1]}",
            "no kernel runs on it",
            "no run",
            "install a torch that was built for it",
        )
    elif capability < (8, 0):
        yield Finding(
            SLOWER,
            f"{name} has compute capability {dotted(capability)}",
            "attention is sdpa, and bf16 is computed through float32",
            "bf16 without tensor cores, a call for each response and layer, and scores that may be stored",
            "use a GPU of 8.0 or more (A100, H100)",
        )
    elif capability[0] not in _KNOWN:
        yield Finding(
            NOTE,
            f"{name} (compute capability {dotted(capability)}) is not known here",
            "layers and attention are chosen as for Blackwell",
            "whether these are the fastest is not known",
            "set model.transformer_impl and model.attention_backend, and compare",
        )
    built, runs = facts.torch_cuda, facts.driver_cuda
    if built is not None and runs is not None and runs < built:
        yield Finding(
            NOTE,
            f"driver {facts.driver} runs CUDA up to {dotted(runs)}, and {facts.torch} is built for {dotted(built)}",
            "CUDA's minor-version compatibility",
            "code that is compiled while it runs may need the newer driver",
            f"install the driver of CUDA {dotted(built)}",
        )


def _runs_on(archs: tuple[str, ...], capability: Pair) -> bool:
    """Whether kernels compiled for `archs` run: sm_ for its major version from its minor on, compute_ for all later."""
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
        if found is None:
            continue
        major, minor = int(found[2]), int(found[3])
        # Those with a letter run on that chip alone.
        if (major, minor) == capability or (
            not found[4] and major == capability[0] and minor <= capability[1]
        ):
            return True
        if found[1] == "compute" and not found[4] and (major, minor) <= capability:
            return True
    return False


def kernels(facts: Facts) -> Iterator[Finding]:
    """Which fast paths are lost on the GPUs."""
    if not facts.gpus or not facts.libraries:
        return
    engine, apex = facts.libraries.get("transformer-engine"), facts.libraries.get("apex")
    if engine is not None and engine.problem is not None:
        yield Finding(
            SLOWER,
            str(engine),
            "Megatron-core's own layers",
            # bf16 gradients written and read again, where fused products add to the float32 sum: 2 + 2 bytes.
            "no FP8, and norms, rotary embedding and weight gradients in kernels of their own: the last alone move 4 "
            "bytes more a parameter and row (8B parameters on an H100: 10 ms)",
            "use the container (Dockerfile), or pip install transformer-engine[pytorch] against this torch",
        )
        if apex is not None and apex.problem is not None:
            yield Finding(
                SLOWER,
                str(apex),
                "torch's fused AdamW, and gradient norms tensor by tensor",
                "two kernels a parameter tensor where one would do for all, some ms a step",
                "use the container (Dockerfile): the apex on PyPI is another package",
            )
    capability = min(gpu.capability for gpu in facts.gpus)
    triton = facts.libraries.get("triton")
    if triton is not None and triton.problem is not None and capability >= (8, 0):
        yield Finding(
            NOTE,
            str(triton),
            "no model.head_backend=triton: the response head is torch's operations",
            # Read and written in the forward pass: 28 bytes a logit, where the kernel has none; in the backward pass
            # 34, where it has 10.
            "52 bytes more move for each logit: some 13 ms for 6,000 response tokens and 128,000 words on an H100",
            "pip install the triton that this torch asks for",
        )
    backend, library = attention(capability, facts.libraries)
    lost = [
        facts.libraries[name]
        for name in ("flash-attn", "torch varlen", "transformer-engine")
        if name in facts.libraries
    ]
    if backend == "sdpa" and capability >= (8, 0):
        yield Finding(
            SLOWER,
            ", ".join(map(str, lost)),
            "attention is sdpa",
            "a call for each response and layer, and with grouped-query attention scores that may be stored: "
            "2 bytes x heads x tokens squared",
            "install torch 2.13 or later, or use the container (Dockerfile)",
        )
    elif backend != "sdpa" and library != lost[0].name:
        yield Finding(
            NOTE,
            str(lost[0]),
            f"attention is {backend}, of {library}",
            "not timed against it",
            "pip install flash-attn against this torch, to compare",
        )
