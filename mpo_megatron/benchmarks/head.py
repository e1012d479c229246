"""The response head against whole logits: bytes that autograd keeps, the peak of what both passes allocate, and time.
On a GPU each backend that can run there has a row.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.benchmarks.measure import (
    add_accelerator,
    clock,
    compare,
    measured_on,
    peak_bytes,
    saved_bytes,
)
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.data import TokenizedGroup
from mpo_megatron.model.head import ResponseHead, no_head
from mpo_megatron.runtime.choices import HEAD
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import initialize
from mpo_megatron.scheduling.pack import PackedRow, pack_row

PROMPT = 64


@dataclass(frozen=True)
class Case:
    """N response tokens, a vocabulary of V, hidden size H."""

    n: int
    v: int
    h: int


CASES = (Case(512, 49152, 576), Case(2048, 49152, 576), Case(1024, 128256, 576))
QUICK_CASES = (Case(512, 8192, 576), Case(512, 49152, 576))
# In bf16.
GPU_CASES = (Case(2048, 128256, 4096), Case(6144, 128256, 4096))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)
    parser.add_argument(
        "--chunk-size", type=int, help="positions whose logits exist at a time (256; 1024 on a GPU)"
    )


def run(arguments: argparse.Namespace) -> Report:
    """Both heads on the same hidden states and weight, in turns."""
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.accelerator)
    initialize(device)
    on_gpu = device.type == "cuda"
    chunk_size = arguments.chunk_size or (1024 if on_gpu else 256)
    cases = GPU_CASES if on_gpu else QUICK_CASES if arguments.quick else CASES
    dtype = torch.bfloat16 if on_gpu else torch.float32
    problems = {name: no_head(name, device, dtype) for name in HEAD}
    usable = [name for name in HEAD if problems[name] is None]
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    repeats = 2 if arguments.quick else arguments.repeats
    for case, backend in product(cases, usable):
        found = _measure(case, backend, chunk_size, repeats, device)
        # What a run takes by itself has the plain names.
        figures |= (
            found if backend == usable[0] else {f"{backend}_head_{name}": found[name] for name in found}
        )
        rows.append(
            [
                f"{case.n} x {case.v} x {case.h}",
                backend,
                *(f"{found[name] / 2**20:.1f}" for name in _MEBIBYTES),
                f"{found['seconds'] * 1e3:.1f}",
                f"{found['time_ratio']:.2f} x",
            ]
        )
    return Report(
        benchmark="head",
        columns=[
            "N x V x H",
            "head",
            "kept, MiB",
            "allowed, MiB",
            "whole logits kept, MiB",
            "peak, MiB",
            "chunk's logits, MiB",
            "whole logits' peak, MiB",
            f"1e-3 {clock(device)}",
            "time to whole logits",
        ],
        rows=rows,
        figures=figures,
        settings={
            "case": f"{cases[-1].n} x {cases[-1].v} x {cases[-1].h}",
            "chunk_size": chunk_size,
            "head": usable[0],
            "on": measured_on(device),
            "threads": arguments.threads,
            "precision": "bfloat16" if on_gpu else "float32",
        },
        notes=[
            "kept: all that autograd saves but the weight, states and row it is given; allowed: N x H numbers + 16 N",
            "peak: forward + backward, beyond inputs and the gradients that are returned; figures: of the last case",
            *(f"{name}: {problem}" for name, problem in problems.items() if problem is not None),
        ],
    )


_MEBIBYTES = (
    "kept_bytes",
    "allowed_bytes",
    "eager_kept_bytes",
    "peak_bytes",
    "chunk_bytes",
    "eager_peak_bytes",
)


def _measure(
    case: Case, backend: str, chunk_size: int, repeats: int, device: torch.device
) -> dict[str, float]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row = _row(case, device)
    head = _head(case, chunk_size, backend).to(device, dtype)
    head.row = row
    hidden = torch.randn(row.tokens.numel(), 1, case.h, device=device, dtype=dtype).requires_grad_()
    weight = head.weight
    ours: Callable[[], Tensor] = lambda: head(hidden)[0]  # noqa: E731
    eager = partial(_eager, hidden, weight, row)
    # Eager logits of bf16 numbers are rounded to bf16, which some thousands of tokens mostly even out.
    limits = (1e-2, 1.0) if device.type == "cuda" else (1e-4, 1e-2)
    torch.testing.assert_close(ours().flatten(), eager(), rtol=limits[0], atol=limits[1])

    def both_passes(forward: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(forward().sum(), (hidden, weight))

    returned = dtype.itemsize * (hidden.numel() + weight.numel())
    sides = {"ours": lambda: both_passes(ours), "eager": lambda: both_passes(eager)}
    seconds = compare(sides, repeats=repeats, device=device)
    ours_seconds, eager_seconds = (statistics.median(seconds[side]) for side in ("ours", "eager"))
    leave_out = (weight, hidden, row.tokens)
    return {
        "kept_bytes": saved_bytes(ours, leave_out),
        "allowed_bytes": dtype.itemsize * case.n * case.h + 16 * case.n,
        "eager_kept_bytes": saved_bytes(eager, leave_out),
        "peak_bytes": peak_bytes(sides["ours"], device) - returned,
        "chunk_bytes": 4 * chunk_size * case.v,
        "eager_peak_bytes": peak_bytes(sides["eager"], device) - returned,
        "seconds": ours_seconds,
        "time_ratio": ours_seconds / eager_seconds,
    }


def _head(case: Case, chunk_size: int, backend: str) -> ResponseHead:
    """The head as the model has it: Megatron's output layer, taken over."""
    config = TransformerConfig(
        num_layers=1, hidden_size=case.h, num_attention_heads=1, use_cpu_initialization=True
    )
    layer = ColumnParallelLinear(
        case.h, case.v, config=config, init_method=partial(torch.nn.init.normal_, std=0.02), bias=False
    )
    ResponseHead.take_over(layer, case.v, chunk_size, backend=backend)
    return layer


def _row(case: Case, device: torch.device) -> PackedRow:
    """One group of four responses, N tokens together."""
    random = np.random.default_rng(0)
    responses = list(random.integers(0, case.v, (4, case.n // 4)))
    scores = np.arange(4.0)
    group = TokenizedGroup("0", random.integers(0, case.v, PROMPT), responses, scores, scores > 1.5)
    return pack_row([group], [range(4)], row_tokens=PROMPT + case.n, shared_prompt=True, device=device)


def _eager(hidden: Tensor, weight: Tensor, row: PackedRow) -> Tensor:
    """[R] the same sums the usual way: logits of all response positions, log-softmax in float32."""
    logits = hidden[row.reads.places.long(), 0] @ weight.t()
    logps = logits.float().log_softmax(-1).gather(1, row.targets.long()[:, None]).squeeze(1)
    return logps.new_zeros(row.num_responses).index_add(0, row.by_response.segment, logps)
