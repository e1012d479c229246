"""The attention backends beside each other on the same rows: time of both passes, FLOP/s, and memory."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.benchmarks.job import random_groups
from mpo_megatron.benchmarks.measure import add_accelerator, clock, compare, measured_on, peak_bytes
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.model.attention import SharedPromptAttention, no_backend
from mpo_megatron.model.segments import RowParams
from mpo_megatron.planning.flops import ATTENTION_BACKWARD
from mpo_megatron.runtime.choices import ATTENTION
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import initialize
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.pack import pack_row


@dataclass(frozen=True)
class Case:
    """A row of `count` groups of n responses; prompts and responses of so many tokens."""

    count: int
    prompt: int
    response: int
    n: int

    def __str__(self) -> str:
        return f"{self.count} x ({self.prompt} + {self.n} x {self.response})"


@dataclass(frozen=True)
class Heads:
    """Query heads, key-value heads, head size."""

    queries: int
    keys: int
    size: int


CPU_CASES = (Case(2, 128, 128, 4),)
# Rows of some 8,000 tokens; the last has one long response after a long prompt.
GPU_CASES = (Case(3, 512, 512, 4), Case(1, 4096, 512, 8), Case(6, 256, 128, 8), Case(1, 4096, 4096, 1))
CPU_HEADS, GPU_HEADS = Heads(8, 2, 64), Heads(32, 8, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)


def run(arguments: argparse.Namespace) -> Report:
    """One layer's attention by every backend that can run here, in turns."""
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.accelerator)
    initialize(device)
    on_gpu = device.type == "cuda"
    heads = GPU_HEADS if on_gpu else CPU_HEADS
    dtype = torch.bfloat16 if on_gpu else torch.float32
    problems = {name: no_backend(name, device, dtype) for name in ATTENTION}
    usable = [name for name in ATTENTION if problems[name] is None]
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for number, case in enumerate(GPU_CASES if on_gpu else CPU_CASES):
        found = _measure(case, heads, usable, 2 if arguments.quick else arguments.repeats, device, dtype)
        for name, (forward, both, size, rate) in found.items():
            rows.append(
                [
                    str(case),
                    name,
                    f"{forward * 1e3:.2f}",
                    f"{both * 1e3:.2f}",
                    f"{rate / 1e12:.3g}",
                    f"{size / 2**20:.0f}",
                ]
            )
            suffix = "" if number == 0 else f"_{case.prompt}_{case.response}_{case.n}"
            figures |= {f"{name}_seconds{suffix}": both, f"{name}_tflops{suffix}": rate / 1e12}
    return Report(
        benchmark="attention",
        columns=["row", "backend", "forward, ms", "both, ms", "TFLOP/s", "peak, MiB"],
        rows=rows,
        figures=figures,
        settings={
            "query heads": heads.queries,
            "key-value heads": heads.keys,
            "head size": heads.size,
            "on": measured_on(device),
            "threads": arguments.threads,
            "precision": str(dtype).removeprefix("torch."),
        },
        notes=[
            f"{clock(device)}, medians, of one layer; peak: what both passes hold at the most beyond their inputs",
            "TFLOP/s: two products over the pairs that the mask leaves in the forward pass, five in the backward pass",
            *(f"{name}: {problem}" for name, problem in problems.items() if problem is not None),
        ],
    )


def _measure(
    case: Case, heads: Heads, backends: list[str], repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[float, float, int, float]]:
    """By backend, (seconds forward, seconds of both passes, peak bytes, FLOP/s)."""
    lengths = GroupLengths(case.prompt, (case.response,) * case.n)
    tokens = case.count * lengths.row_tokens(True)
    groups = random_groups(case.count, case.prompt, case.response, case.n, 1000)
    numbers = [range(i * case.n, (i + 1) * case.n) for i in range(case.count)]
    params = RowParams(pack_row(groups, numbers, row_tokens=tokens, shared_prompt=True, device=device))
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads.queries * heads.size,
        num_attention_heads=heads.queries,
        num_query_groups=heads.keys,
        kv_channels=heads.size,
    )
    shapes = [(tokens, 1, count, heads.size) for count in (heads.queries, heads.keys, heads.keys)]
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    upstream = torch.randn(tokens, 1, heads.queries * heads.size, device=device, dtype=dtype)
    layers = {name: SharedPromptAttention(config, 1, backend=name) for name in backends}
    outputs = {name: layer(*inputs, packed_seq_params=params) for name, layer in layers.items()}
    for out in outputs.values():  # sdpa is always the last
        off = (out - outputs["sdpa"]).float().norm() / outputs["sdpa"].float().norm()
        assert float(off) < 2e-2, f"off by {float(off):.1e} from sdpa"
    del outputs

    def both(layer: SharedPromptAttention) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(*inputs, packed_seq_params=params), inputs, upstream)

    def forward(layer: SharedPromptAttention) -> Tensor:
        with torch.no_grad():
            out: Tensor = layer(*inputs, packed_seq_params=params)
        return out

    sides: dict[str, Callable[[], object]] = {}
    for name, layer in layers.items():
        sides |= {f"{name} forward": partial(forward, layer), name: partial(both, layer)}
    seconds = {
        side: statistics.median(found)
        for side, found in compare(sides, repeats=repeats, device=device).items()
    }
    flops = 4.0 * heads.queries * heads.size * case.count * lengths.attention_pairs(True)
    returned = sum(t.numel() for t in inputs) * dtype.itemsize
    return {
        name: (
            seconds[f"{name} forward"],
            seconds[name],
            peak_bytes(sides[name], device) - returned,
            flops * (1 + ATTENTION_BACKWARD) / seconds[name],
        )
        for name in backends
    }
