"""Layouts that fit the GPUs' memory, best expected throughput first, and why the others do not.

Looked through: TP that divides the heads and stays within a node, PP that divides the layers, VPP that divides a stage,
CP, EP of a mixture of experts, recomputation none or full; data parallelism takes the other GPUs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Architecture, check_layout
from mpo_megatron.planning.hardware import Machine
from mpo_megatron.planning.memory import GIB, RESERVED, StageMemory, largest_stage
from mpo_megatron.planning.performance import StepTime, step_time
from mpo_megatron.planning.profile import StepShape, plan_rows
from mpo_megatron.planning.run import FULL, NO_RECOMPUTE, Run
from mpo_megatron.scheduling.layout import GroupLengths

# Not the selective one: no attention here keeps scores that computing it again would save.
RECOMPUTE = (NO_RECOMPUTE, FULL)
_CONTEXT = (1, 2, 4, 8)
_CHUNKS = (1, 2, 3, 4, 5, 8)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        memory: of its largest stage.
    """

    run: Run
    memory: StageMemory
    time: StepTime
    shape: StepShape


@dataclass(frozen=True)
class Refused:
    """Layouts that do not fit for one reason; `example` is the one that misses by least, where that can be said."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Found:
    """Of a search: what fits, best first, and what does not."""

    candidates: list[Candidate]
    refused: list[Refused]


def search(
    a: Architecture,
    base: Run,
    groups: Sequence[GroupLengths],
    machine: Machine,
    efficiency: float,
    multiple_of: Callable[[int], int],
) -> Found:
    """Try all layouts of `machine`.

    Args:
        base: what the layouts share.
        groups: lengths of a global batch.
        efficiency: see `performance.step_time`.
        multiple_of: from a tensor-parallel size to `Run.token_multiple`.

    Raises:
        ConfigError: a prompt with one of its responses is above the token budget.
    """
    capacity = machine.gpu.memory - RESERVED
    shapes: dict[tuple[int, ...], StepShape] = {}
    candidates: list[Candidate] = []
    refused: dict[str, list[tuple[float, str]]] = {}

    def refuse(reason: str, by: float, run: Run) -> None:
        refused.setdefault(reason, []).append((by, str(run)))

    for run in _layouts(a, base, machine, multiple_of, refuse):
        key = (run.dp, run.pp, run.vpp, run.cp, run.token_multiple)
        if key not in shapes:
            shapes[key] = plan_rows(groups, run, a.cost_model)
        for recompute in RECOMPUTE:
            tried = replace(run, recompute=recompute)
            memory = largest_stage(a, tried, shapes[key])
            state = memory.weights + memory.gradients + memory.optimizer
            if memory.total > capacity:
                part = "weights, gradients and optimizer alone" if state > capacity else "with activations"
                reason = f"more than the {machine.gpu.memory / GIB:.0f} GiB less {RESERVED / GIB:.0f}: {part}"
                refuse(reason, memory.total - capacity, tried)
                continue
            time = step_time(a, tried, shapes[key], machine, efficiency)
            candidates.append(Candidate(tried, memory, time, shapes[key]))
    candidates.sort(key=lambda found: -found.time.groups_per_second)
    reasons = [
        Refused(reason, len(found), _nearest(found)) for reason, found in sorted(refused.items(), key=_most)
    ]
    return Found(candidates, reasons)


def _most(item: tuple[str, list]) -> int:
    return -len(item[1])


def _nearest(found: list[tuple[float, str]]) -> str:
    by, run = min(found)
    return f"{run} by {by / GIB:.1f} GiB" if by else run


def _layouts(
    a: Architecture,
    base: Run,
    machine: Machine,
    multiple_of: Callable[[int], int],
    refuse: Callable[[str, float, Run], None],
) -> Iterator[Run]:
    for tp in _powers(machine.per_node):
        for pp in range(1, min(a.num_layers, machine.gpus) + 1):
            for cp in _CONTEXT:
                if machine.gpus % (tp * pp * cp):
                    continue
                dp = machine.gpus // (tp * pp * cp)
                run = replace(
                    base, tp=tp, pp=pp, vpp=1, cp=cp, dp=dp, ep=1, first_stage=None, last_stage=None,
                    sequence_parallel=tp > 1, token_multiple=multiple_of(tp),
                )  # fmt: skip
                yield from _chunks_and_experts(a, run, refuse)


def _chunks_and_experts(
    a: Architecture, run: Run, refuse: Callable[[str, float, Run], None]
) -> Iterator[Run]:
    experts = (1,) if a.experts is None else _powers(a.experts.number)
    for ep in experts:
        for vpp in _CHUNKS if run.pp > 1 else (1,):
            tried = replace(run, vpp=vpp, ep=ep)
            if run.replicas % ep or (vpp > 1 and a.num_layers % (run.pp * vpp)):
                continue
            problem = _problem(a, tried)
            if problem is None:
                yield tried
            elif vpp == 1:
                refuse(problem, 0, tried)


def _problem(a: Architecture, run: Run) -> str | None:
    """Why the model cannot be cut so, by the rules that the job checks; None: it can."""
    try:
        check_layout(a, tp=run.tp, pp=run.pp, vpp=run.vpp, ep=run.ep, max_length=1)
    except ConfigError as error:
        if "pipeline" in str(error).split("=")[0]:
            return f"stages do not divide the {a.num_layers} layers"
        return str(error).split(";")[0]
    return None


def _powers(largest: int) -> list[int]:
    return [2**k for k in range(largest.bit_length()) if 2**k <= largest]
