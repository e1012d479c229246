"""Groups with a shared prompt against the same groups without: packed, free of padding, a prompt for each response.

The other side is what a good trainer of pairs does on Megatron. Both have the same budget of tokens a row, which holds
the largest group either way, and the same planner: what differs is the sharing alone.
"""

import argparse
import statistics

from mpo_megatron.benchmarks.job import Job, random_groups
from mpo_megatron.benchmarks.measure import add_accelerator, clock, compare
from mpo_megatron.benchmarks.models import small_llama
from mpo_megatron.benchmarks.report import Report

SIZES = (2, 4, 8, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)
    parser.add_argument("--prompt", type=int, default=104, help="tokens of a prompt (104)")
    parser.add_argument("--response", type=int, default=110, help="tokens of a response (110)")
    parser.add_argument("--responses", type=int, default=32, help="of a step, in groups of n (32)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, help="8, or 2 with --quick")
    parser.add_argument("--vocab", type=int, default=8192)


def run(arguments: argparse.Namespace) -> Report:
    """Whole training steps on the same responses in groups of each size, both ways in turns."""
    quick = arguments.quick
    layers = arguments.layers or (2 if quick else 8)
    responses = min(arguments.responses, max(SIZES)) if quick else arguments.responses
    prompt, response = arguments.prompt, arguments.response
    architecture = small_llama(
        hidden=arguments.hidden, layers=layers, vocab=arguments.vocab, max_positions=prompt + response
    )
    job = Job.start(architecture, arguments.threads, accelerator=arguments.accelerator)
    budget = max(SIZES) * (prompt + response)
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for n in SIZES:
        count = max(1, responses // n)
        groups = random_groups(count, prompt, response, n, architecture.vocab_size)
        positions = range(count)
        shared, unshared = (
            job.source(groups, max_tokens=budget, shared_prompt=shares) for shares in (True, False)
        )
        reference = job.reference(shared)
        seconds = compare(
            {
                "shared": lambda: job.train(shared, positions, reference),  # noqa: B023
                "unshared": lambda: job.train(unshared, positions, reference),  # noqa: B023
            },
            repeats=min(arguments.repeats, 2) if quick else arguments.repeats,
            device=job.layout.device,
        )
        median = {name: statistics.median(values) for name, values in seconds.items()}
        lengths, cost = shared.lengths(0), architecture.cost_model
        ratio = cost.of(lengths, shared_prompt=False) / cost.of(lengths, shared_prompt=True)
        gain = median["unshared"] / median["shared"]
        plans = shared.plan(positions), unshared.plan(positions)
        rows.append(
            [
                str(n),
                *(f"{plan.padded_tokens:,}" for plan in plans),
                f"{count / median['shared']:.2f}",
                f"{count / median['unshared']:.2f}",
                f"{gain:.2f} x",
                f"{ratio:.2f} x",
            ]
        )
        figures |= {f"gain_{n}": gain, f"flop_ratio_{n}": ratio}
    return Report(
        benchmark="unshared",
        columns=[
            "responses",
            "row tokens shared",
            "unshared",
            "groups/s shared",
            "unshared",
            "gain",
            "FLOP ratio",
        ],
        rows=rows,
        figures=figures,
        settings={
            "prompt": prompt,
            "response": response,
            "responses_per_step": responses,
            "max_tokens": budget,
            "hidden": architecture.hidden_size,
            "layers": layers,
            "vocab": architecture.vocab_size,
            **job.settings(arguments.threads),
        },
        notes=[
            f"whole steps with the optimizer, medians; groups/s: per {clock(job.layout.device)}",
            "unshared: the same planner and rows, a prompt for each response, no padding between",
            "FLOP ratio: of the model's products, attention with them, by formula",
        ],
    )
