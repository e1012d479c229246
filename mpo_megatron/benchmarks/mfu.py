"""Model FLOPs utilisation of training steps on layers of Llama 3 8B: groups of four responses, 512 tokens everywhere.

Models of a few layers are trained, at two depths; what one layer more takes, times 32, makes a step of the whole model.
That is a rank's own work: no communication, and an optimizer that is not shared out.
"""

import argparse
import gc
import statistics
from dataclasses import dataclass, replace

import torch

from mpo_megatron.benchmarks.job import Job, fastest, random_groups
from mpo_megatron.benchmarks.measure import add_accelerator, clock, compare
from mpo_megatron.benchmarks.models import LLAMA3_8B
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.fp8 import RECIPES, Fp8, Machine, check_machine
from mpo_megatron.model.provider import ModelOptions, no_transformer_engine
from mpo_megatron.planning.flops import model_flops
from mpo_megatron.runtime import capabilities
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import shutdown
from mpo_megatron.runtime.peak import peak_memory, product_rate
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.training.throughput import gpu_peak

N = 4
# The same proportions for a CPU: heads of 64.
SMALL = replace(
    LLAMA3_8B, hidden_size=256, ffn_hidden_size=896, num_heads=4, num_kv_heads=1, head_dim=64, vocab_size=8192,
    inverse_frequencies=tuple(500_000.0 ** (-2 * i / 64) for i in range(32)),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Seconds of forward and backward, and of the whole step with the optimizer; most bytes of a GPU's tensors."""

    passes: float
    whole: float
    peak_bytes: float = 0.0

    def deeper(self, other: "Step", layers: float) -> "Step":
        """This step with so many times the difference that `other` has to it added."""
        return Step(
            self.passes + layers * (other.passes - self.passes),
            self.whole + layers * (other.whole - self.whole),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 4), metavar=("FEW", "MORE"))
    parser.add_argument("--groups", type=int, help="of a step: 12 on a GPU, 2 on a CPU")
    parser.add_argument("--tokens", type=int, help="of a prompt and of each response: 512, or 64 on a CPU")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a row (8192)")
    parser.add_argument("--fp8", choices=RECIPES, help="products in 8 bits, by this recipe")


def run(arguments: argparse.Namespace) -> Report:
    """Steps of models of two depths, one after the other, and what they say of the whole."""
    device = choose_device(arguments.accelerator)
    on_gpu = device.type == "cuda"
    few, more = arguments.layers
    if not 0 < few < more:
        raise ConfigError(f"--layers {few} {more} must be two numbers of layers, the smaller one first")
    length = arguments.tokens or (512 if on_gpu else 64)
    count = arguments.groups or (12 if on_gpu else 2)
    repeats = min(arguments.repeats, 3) if arguments.quick else arguments.repeats
    whole = LLAMA3_8B if on_gpu else SMALL
    fp8 = None if arguments.fp8 is None else Fp8("hybrid", arguments.fp8)
    options = replace(fastest(device), fp8=fp8)
    if fp8 is not None:
        _check(fp8, options, device)

    measured: dict[int, Step] = {}
    peak: float | None = None
    for layers in (few, more):
        job = Job.start(
            replace(whole, num_layers=layers),
            arguments.threads,
            accelerator=arguments.accelerator,
            options=options,
        )
        measured[layers] = _measure(job, count, length, arguments.max_tokens, repeats)
        settings = job.settings(arguments.threads)
        if on_gpu:
            peak, peak_of = gpu_peak(torch.cuda.get_device_name(device), options.dtype, fp8 is not None)
        else:
            peak = product_rate(options.dtype)
            peak_of = f"{peak / 1e9:.0f} GFLOP/s, measured in matrix products now"
        del job
        _free(device)
    steps = measured | {
        whole.num_layers: measured[few].deeper(measured[more], (whole.num_layers - few) / (more - few))
    }
    groups = [GroupLengths(length, (length,) * N)] * count
    flops = {layers: _flops(whole, layers, groups) for layers in steps}
    rows = [
        [
            f"{layers}{'' if layers in measured else ', by the difference'}",
            f"{step.passes:.3f}",
            f"{step.whole:.3f}",
            f"{count / step.whole:.2f}",
            f"{flops[layers] / step.whole / 1e12:.3g}",
            _percent(flops[layers] / step.whole, peak),
            _percent(flops[layers] / step.passes, peak),
            f"{step.peak_bytes / 2**30:.1f}" if step.peak_bytes else "",
        ]
        for layers, step in steps.items()
    ]
    figures: dict[str, float] = {}
    for layers, step in steps.items():
        name = "" if layers not in measured else f"_{layers}_layers"
        figures |= {f"seconds{name}": step.whole, f"tflops{name}": flops[layers] / step.whole / 1e12}
        if step.peak_bytes:
            figures |= {f"peak_bytes{name}": step.peak_bytes, "layers": layers}
        if peak is not None:
            figures |= {
                f"mfu{name}": flops[layers] / step.whole / peak,
                f"mfu_passes{name}": flops[layers] / step.passes / peak,
            }
    return Report(
        benchmark="mfu",
        columns=[
            "layers", "forward + backward, s", "step, s", "groups/s", "TFLOP/s", "MFU", "MFU without optimizer",
            "peak, GiB",
        ],
        rows=rows,
        figures=figures,
        settings={
            "groups": count, "prompt": length, "response": length, "responses": N, "max_tokens": arguments.max_tokens,
            "hidden": whole.hidden_size, "feed-forward": whole.ffn_hidden_size, "vocab": whole.vocab_size,
            "fp8": str(arguments.fp8), **settings,
        },
        notes=[
            f"{clock(device)}, medians; MFU: model FLOPs (planning/flops.py; no padding, nothing twice) over the peak: "
            f"{peak_of}",
            f"{whole.num_layers} layers: {few} layers, and the difference that {more - few} more make, times "
            f"{whole.num_layers - few} / {more - few}; no communication, the optimizer's state not shared out",
        ],
    )  # fmt: skip


def _check(fp8: Fp8, options: ModelOptions, device: torch.device) -> None:
    """Raise ConfigError unless this machine computes in 8 bits by this recipe."""
    if not options.transformer_engine:
        problem = no_transformer_engine(device, torch.bfloat16)
        raise ConfigError(f"--fp8 is of Transformer Engine's layers: {problem}; mend that, or leave it out")
    cuda = capabilities.version_numbers(torch.version.cuda or "0.0")
    capability = torch.cuda.get_device_capability(device)
    check_machine(fp8, Machine(capability, cuda, capabilities.transformer_engine().version))


def _flops(whole: Architecture, layers: int, groups: list[GroupLengths]) -> float:
    return model_flops(replace(whole, num_layers=layers).cost_model, groups, shared_prompt=True)


def _percent(rate: float, peak: float | None) -> str:
    return "not known" if peak is None else f"{rate / peak:.1%}"


def _measure(job: Job, count: int, length: int, max_tokens: int, repeats: int) -> Step:
    source = job.source(
        random_groups(count, length, length, N, job.architecture.vocab_size), max_tokens=max_tokens
    )
    reference, positions = job.reference(source), range(count)
    device = job.layout.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = compare(
        {
            "passes": lambda: job.gradients(source, positions, reference),
            "whole": lambda: job.train(source, positions, reference),
        },
        repeats=repeats,
        warm_up=2,
        device=device,
    )
    return Step(
        statistics.median(seconds["passes"]),
        statistics.median(seconds["whole"]),
        float(peak_memory(device)) if device.type == "cuda" else 0.0,
    )


def _free(device: torch.device) -> None:
    """Room for the next model."""
    shutdown()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
