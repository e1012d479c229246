"""What a group costs that is cut over several rows: one more forward pass of its rows, and nothing elsewhere."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from mpo_megatron.benchmarks.job import Job, random_groups
from mpo_megatron.benchmarks.measure import add_accelerator, clock, compare
from mpo_megatron.benchmarks.models import LLAMA3_8B, small_llama
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.data import TokenizedGroup
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.scheduling.rows import RowSource

N, PARTS = 8, 2
# Tokens of a prompt and of each response.
CPU_LENGTH, GPU_LENGTH = 128, 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)
    parser.add_argument("--hidden", type=int, default=1024, help="on a CPU (1024); a GPU has Llama 3 8B's")
    parser.add_argument("--layers", type=int, help="3 on a CPU, 2 on a GPU")
    parser.add_argument("--vocab", type=int, default=8192, help="on a CPU (8192)")


def run(arguments: argparse.Namespace) -> Report:
    """Steps of two passes over rows of parts against steps of one pass over the same rows, in turns."""
    device = choose_device(arguments.accelerator)
    on_gpu = device.type == "cuda"
    layers = arguments.layers or (2 if on_gpu else 3)
    layers = min(layers, 2) if arguments.quick else layers
    architecture = (
        replace(LLAMA3_8B, num_layers=layers)
        if on_gpu
        else small_llama(hidden=arguments.hidden, layers=layers, vocab=arguments.vocab, max_positions=1024)
    )
    length = GPU_LENGTH if on_gpu else CPU_LENGTH
    job = Job.start(architecture, arguments.threads, accelerator=arguments.accelerator)
    groups = random_groups(2, length, length, N, architecture.vocab_size)
    budget = length + N // PARTS * length
    split = job.source(groups, max_tokens=budget)
    # The same rows as groups of their own: each part keeps its best response as the preferred one.
    whole = job.source([part for group in groups for part in _parts(split, group)], max_tokens=budget)
    assert len(split.step(range(2)).rows) == len(whole.step(range(2 * PARTS)).rows) == 2 * PARTS

    steps = {
        "split": partial(job.gradients, split, range(2), job.reference(split)),
        "whole": partial(job.gradients, whole, range(2 * PARTS), job.reference(whole)),
    }
    rows_run = {name: _count_rows(job, step) for name, step in steps.items()}
    seconds = compare(steps, repeats=3 if arguments.quick else arguments.repeats, device=device)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    # Turn by turn: a drift of the machine's speed meets both sides of a ratio.
    overhead = statistics.median(s / w for s, w in zip(seconds["split"], seconds["whole"], strict=True))
    rows = 2 * PARTS
    return Report(
        benchmark="two-pass",
        columns=["rows hold", "rows", "forward passes", f"{clock(device)}/step", "overhead"],
        rows=[
            ["whole groups", str(rows), str(rows_run["whole"]), f"{median['whole']:.2f}", "1.00 x"],
            [
                "parts of groups",
                str(rows),
                str(rows_run["split"]),
                f"{median['split']:.2f}",
                f"{overhead:.2f} x",
            ],
        ],
        figures={"overhead": overhead, "overhead_whole": rows_run["whole"] / rows},
        settings={
            "prompt": length,
            "response": length,
            "responses": N,
            "parts": PARTS,
            "hidden": architecture.hidden_size,
            "layers": layers,
            "vocab": architecture.vocab_size,
            **job.settings(arguments.threads),
        },
        notes=[
            "the same rows both times; overhead_whole counts the forward passes of rows that hold whole groups"
        ],
    )


def _parts(source: RowSource, group: TokenizedGroup) -> list[TokenizedGroup]:
    """The parts that the planner makes of a group, each as a group with a preferred response."""
    number = int(group.id)
    parts = []
    for rank_rows in source.plan([number]).rows:
        for part in (part for row in rank_rows for part in row):
            alone = group.select(part.responses)
            preferred = alone.scores == alone.scores.max()
            parts.append(
                TokenizedGroup(group.id, alone.prompt_ids, alone.response_ids, alone.scores, preferred)
            )
    return parts


def _count_rows(job: Job, call: Callable[[], object]) -> int:
    """How many rows go forward through the model in a call."""
    count = 0

    def hook(*args: object) -> None:
        nonlocal count
        count += 1

    handle = job.chunks[0].register_forward_pre_hook(hook)
    try:
        call()
    finally:
        handle.remove()
    return count
