"""What a group costs that is cut over several rows: one more forward pass of its rows, and nothing elsewhere."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

from mpo_megatron.benchmarks.job import Job, random_groups, small_llama
from mpo_megatron.benchmarks.measure import compare
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.data import TokenizedGroup
from mpo_megatron.scheduling.rows import RowSource

PROMPT, RESPONSE, N, PARTS = 128, 128, 8, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=8192)


def run(arguments: argparse.Namespace) -> Report:
    """Steps of two passes over rows of parts against steps of one pass over the same rows, in turns."""
    layers = min(arguments.layers, 2) if arguments.quick else arguments.layers
    architecture = small_llama(
        hidden=arguments.hidden, layers=layers, vocab=arguments.vocab, max_positions=1024
    )
    job = Job.start(architecture, arguments.threads)
    groups = random_groups(2, PROMPT, RESPONSE, N, architecture.vocab_size)
    budget = PROMPT + N // PARTS * RESPONSE
    split = job.source(groups, max_tokens=budget)
    # The same rows as groups of their own: each part keeps its best response as the preferred one.
    whole = job.source([part for group in groups for part in _parts(split, group)], max_tokens=budget)
    assert len(split.step(range(2)).rows) == len(whole.step(range(2 * PARTS)).rows) == 2 * PARTS

    steps = {
        "split": partial(job.gradients, split, range(2), job.reference(split)),
        "whole": partial(job.gradients, whole, range(2 * PARTS), job.reference(whole)),
    }
    rows_run = {name: _count_rows(job, step) for name, step in steps.items()}
    seconds = compare(steps, repeats=3 if arguments.quick else arguments.repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    # Turn by turn: a drift of the machine's speed meets both sides of a ratio.
    overhead = statistics.median(s / w for s, w in zip(seconds["split"], seconds["whole"], strict=True))
    rows = 2 * PARTS
    return Report(
        benchmark="two-pass",
        columns=["rows hold", "rows", "forward passes", "CPU s/step", "overhead"],
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
            "prompt": PROMPT,
            "response": RESPONSE,
            "responses": N,
            "parts": PARTS,
            "hidden": arguments.hidden,
            "layers": layers,
            "vocab": arguments.vocab,
            "threads": arguments.threads,
            "precision": "fp32",
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
