"""A group's prompt stored once against a prompt for each response: time of training steps, and FLOPs."""

import argparse
import statistics
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product

from mpo_megatron.benchmarks.job import Job, random_groups
from mpo_megatron.benchmarks.measure import add_accelerator, clock, compare
from mpo_megatron.benchmarks.models import LLAMA3_8B, small_llama
from mpo_megatron.benchmarks.ranks import on_ranks
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import shutdown
from mpo_megatron.scheduling.layout import GroupLengths


@dataclass(frozen=True)
class Shape:
    """Groups of n responses of `response` tokens after a prompt of `prompt` tokens."""

    prompt: int
    response: int
    n: int

    @property
    def lengths(self) -> GroupLengths:
        return GroupLengths(self.prompt, (self.response,) * self.n)


# Those of which a figure is claimed, then others.
CLAIMED = (Shape(256, 256, 4), Shape(512, 128, 8))
OTHERS = (Shape(128, 256, 4), Shape(512, 512, 2))
# On a GPU, with two layers of Llama 3 8B.
GPU_SHAPES = (Shape(512, 512, 4), Shape(256, 256, 4), Shape(512, 128, 8), Shape(2048, 512, 8))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)
    parser.add_argument(
        "--ranks", action="store_true", help="on a CPU also at TP 2 and at CP 2, on two ranks"
    )
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
    repeats = 3 if arguments.quick else arguments.repeats
    found = [("1 rank", "", shape, *_measure(job, shape, repeats)) for shape in shapes]
    settings = job.settings(arguments.threads)
    if arguments.ranks and device.type == "cpu":
        shutdown()
        size = (arguments.hidden, layers, arguments.vocab)
        for shape, (name, sizes) in product(CLAIMED, {"tp2": (2, 1), "cp2": (1, 2)}.items()):
            of_ranks = on_ranks(2, "shared_prompt", "on_a_rank", *sizes, *size, *astuple(shape), repeats)
            seconds = [
                statistics.median(map(sum, zip(*turns, strict=True))) for turns in zip(*of_ranks, strict=True)
            ]
            cost, lengths = architecture.cost_model, shape.lengths
            ratio = cost.of(lengths, shared_prompt=False) / cost.of(lengths, shared_prompt=True)
            found.append((f"{name[:2].upper()} 2", f"_{name}", shape, seconds[1] / seconds[0], ratio))
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for on, where, shape, gain, ratio in found:
        rows.append(
            [
                on,
                str(shape.prompt),
                str(shape.response),
                str(shape.n),
                f"{gain:.2f} x",
                f"{ratio:.2f} x",
                f"{gain / ratio:.1%}",
            ]
        )
        of_shape = "" if shape == shapes[0] else f"_{shape.prompt}_{shape.response}_{shape.n}"
        suffix = f"{where}{of_shape}"
        figures |= {
            f"gain{suffix}": gain,
            f"flop_ratio{suffix}": ratio,
            f"efficiency{suffix}": gain / ratio,
        }
    return Report(
        benchmark="shared-prompt",
        columns=["on", "prompt tokens", "response tokens", "responses", "gain", "FLOP ratio", "efficiency"],
        rows=rows,
        figures=figures,
        settings={
            "hidden": architecture.hidden_size,
            "layers": layers,
            "vocab": architecture.vocab_size,
            **settings,
        },
        notes=[
            f"gain: {clock(device)} of forward + backward with repeated prompts over those with shared ones, medians",
            "FLOP ratio: the same by formula (matrix products, attention pairs, head); efficiency: gain over it",
        ],
    )


def _measure(job: Job, shape: Shape, repeats: int) -> tuple[float, float]:
    """(gain, FLOP ratio) of one shape."""
    seconds = _compare(job, shape, repeats)
    lengths, cost = shape.lengths, job.architecture.cost_model
    ratio = cost.of(lengths, shared_prompt=False) / cost.of(lengths, shared_prompt=True)
    return statistics.median(seconds["repeated"]) / statistics.median(seconds["shared"]), ratio


def _compare(job: Job, shape: Shape, repeats: int) -> dict[str, list[float]]:
    """This rank's seconds of one shape, both ways."""
    groups = random_groups(1, shape.prompt, shape.response, shape.n, job.architecture.vocab_size)
    tokens = shape.n * (shape.prompt + shape.response)
    sources = {
        name: job.source(groups, max_tokens=tokens, shared_prompt=name == "shared")
        for name in ("shared", "repeated")
    }
    reference = job.reference(sources["shared"])
    steps = {name: partial(job.gradients, source, [0], reference) for name, source in sources.items()}
    return compare(steps, repeats=repeats, device=job.layout.device)


def on_a_rank(
    tp: int, cp: int, hidden: int, layers: int, vocab: int, prompt: int, response: int, n: int, repeats: int
) -> list[list[float]]:
    """One rank's seconds with a shared prompt, and with repeated ones."""
    architecture = small_llama(hidden=hidden, layers=layers, vocab=vocab, max_positions=2048)
    seconds = _compare(Job.start(architecture, 1, tp=tp, cp=cp), Shape(prompt, response, n), repeats)
    return [seconds["shared"], seconds["repeated"]]
