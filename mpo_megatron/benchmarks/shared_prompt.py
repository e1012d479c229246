"""A group's prompt stored once against a prompt for each response: time of training steps, and FLOPs."""

import argparse
import statistics
from dataclasses import dataclass, replace

from mpo_megatron.benchmarks.job import Job, random_groups
from mpo_megatron.benchmarks.measure import add_accelerator, clock, compare
from mpo_megatron.benchmarks.models import LLAMA3_8B, small_llama
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.runtime.device import choose_device


@dataclass(frozen=True)
class Shape:
    """Groups of n responses of `response` tokens after a prompt of `prompt` tokens."""

    prompt: int
    response: int
    n: int


# Those of which a figure is claimed, then others.
CLAIMED = (Shape(256, 256, 4), Shape(512, 128, 8))
OTHERS = (Shape(128, 256, 4), Shape(512, 512, 2))
# On a GPU, with two layers of Llama 3 8B.
GPU_SHAPES = (Shape(512, 512, 4), Shape(256, 256, 4), Shape(512, 128, 8), Shape(2048, 512, 8))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)
    parser.add_argument("--hidden", type=int, default=512, help="on a CPU (512); a GPU has Llama 3 8B's")
    parser.add_argument("--layers", type=int, help="8 on a CPU, 2 on a GPU")
    parser.add_argument("--vocab", type=int, default=8192, help="on a CPU (8192)")


def run(arguments: argparse.Namespace) -> Report:
    """Forward and backward of one group at a time, both ways in turns."""
    device = choose_device(arguments.accelerator)
    shapes: tuple[Shape, ...]
    if device.type == "cuda":
        shapes, layers = GPU_SHAPES, arguments.layers or 2
        architecture = replace(LLAMA3_8B, num_layers=layers)
    else:
        shapes, layers = CLAIMED if arguments.quick else CLAIMED + OTHERS, arguments.layers or 8
        layers = min(layers, 4) if arguments.quick else layers
        architecture = small_llama(
            hidden=arguments.hidden, layers=layers, vocab=arguments.vocab, max_positions=2048
        )
    job = Job.start(architecture, arguments.threads, accelerator=arguments.accelerator)
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for shape in shapes:
        gain, ratio = _measure(job, shape, 3 if arguments.quick else arguments.repeats)
        rows.append(
            [
                str(shape.prompt),
                str(shape.response),
                str(shape.n),
                f"{gain:.2f} x",
                f"{ratio:.2f} x",
                f"{gain / ratio:.1%}",
            ]
        )
        suffix = "" if shape == shapes[0] else f"_{shape.prompt}_{shape.response}_{shape.n}"
        figures |= {
            f"gain{suffix}": gain,
            f"flop_ratio{suffix}": ratio,
            f"share{suffix}": gain / ratio,
        }
    return Report(
        benchmark="shared-prompt",
        columns=["prompt tokens", "response tokens", "responses", "gain", "FLOP ratio", "share"],
        rows=rows,
        figures=figures,
        settings={
            "hidden": architecture.hidden_size,
            "layers": layers,
            "vocab": architecture.vocab_size,
            **job.settings(arguments.threads),
        },
        notes=[
            f"gain: {clock(device)} of forward + backward with repeated prompts over those with shared ones, medians",
            "FLOP ratio: the same by formula (matrix products, attention pairs, head); share: gain over FLOP ratio",
        ],
    )


def _measure(job: Job, shape: Shape, repeats: int) -> tuple[float, float]:
    """(gain, FLOP ratio) of one shape."""
    groups = random_groups(1, shape.prompt, shape.response, shape.n, job.architecture.vocab_size)
    tokens = shape.n * (shape.prompt + shape.response)
    sources = {
        name: job.source(groups, max_tokens=tokens, shared_prompt=name == "shared")
        for name in ("shared", "repeated")
    }
    reference = job.reference(sources["shared"])

    def step(name: str) -> float:
        return job.gradients(sources[name], [0], reference)

    seconds = compare(
        {"shared": lambda: step("shared"), "repeated": lambda: step("repeated")},
        repeats=repeats,
        device=job.layout.device,
    )
    lengths, cost = sources["shared"].lengths(0), job.architecture.cost_model
    ratio = cost.of(lengths, shared_prompt=False) / cost.of(lengths, shared_prompt=True)
    return statistics.median(seconds["repeated"]) / statistics.median(seconds["shared"]), ratio
