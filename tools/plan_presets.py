"""Write what the planner says of each preset: its layouts (conf/layout) and the table of docs/presets.md.

    python tools/plan_presets.py              # state the layouts that are there again
    python tools/plan_presets.py --search     # choose them anew, first

A test compares what is written with what the planner says now.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from mpo_megatron.benchmarks.plan import ultrafeedback_like
from mpo_megatron.config import Config
from mpo_megatron.config.groups import CONF, compose_config
from mpo_megatron.errors import UserError
from mpo_megatron.model.architecture import Architecture, read_config_file
from mpo_megatron.model.fp8 import Fp8, row_alignment
from mpo_megatron.planning.configuration import run_of
from mpo_megatron.planning.hardware import Machine, known_gpu
from mpo_megatron.planning.memory import GIB
from mpo_megatron.planning.presets import Cost, Lengths, Target, choose, cost_of
from mpo_megatron.planning.profile import even_groups
from mpo_megatron.planning.run import Run
from mpo_megatron.scheduling.layout import GroupLengths

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "presets.md"
BEGIN, END = "<!-- what tools/plan_presets.py writes -->", "<!-- until here -->"
# Each preset's architecture, as published.
CONFIGS = ROOT / "tests" / "data" / "configs"
PUBLISHED = {
    "llama3_8b": "Llama-3.1-8B",
    "llama3_70b": "Llama-3.3-70B",
    "mistral_7b": "Mistral-7B-v0.3",
    "qwen2_5_7b": "Qwen2.5-7B",
    "qwen2_5_14b": "Qwen2.5-14B",
    "qwen2_5_32b": "Qwen2.5-32B",
    "qwen3_8b": "Qwen3-8B",
    "qwen3_14b": "Qwen3-14B",
    "qwen3_32b": "Qwen3-32B",
}
GPUS = {"a100_80gb": "A100", "h100": "H100"}
NODES = {"llama3_70b": ("4x8", "8x8"), "qwen2_5_32b": ("1x8", "4x8"), "qwen3_32b": ("1x8", "4x8")}
SMALL = ("1x8", "2x8")
# What one node does not hold in FP8: the casts of the weights come on top.
TOO_MUCH = {("qwen2_5_32b", "1x8", "fp8"), ("qwen3_32b", "1x8", "fp8")}
GIVEN = ("model.restore_from_path=none", "model.data.train=none")  # nothing is read
EFFICIENCY = 0.6  # as plan_run's


@dataclass(frozen=True)
class Variant:
    """A preset with the choices that its layout depends on."""

    preset: str
    gpu: str
    nodes: str
    precision: str

    @property
    def path(self) -> Path:
        return CONF / "layout" / self.preset / f"{self.gpu}_{self.nodes}_{self.precision}.yaml"

    def config(self, *more: str) -> Config:
        """The main job's configuration."""
        choices = [f"gpu={self.gpu}", f"nodes={self.nodes}", f"precision={self.precision}"]
        return compose_config(CONF / f"{self.preset}.yaml", [*choices, *GIVEN, *more])

    def target(self, config: Config) -> Target:
        trainer, model = config.trainer, config.model
        assert trainer.devices is not None
        fp8 = None if model.fp8 is None else Fp8(model.fp8, model.fp8_recipe)
        return Target(
            Machine(known_gpu(GPUS[self.gpu]), trainer.num_nodes * trainer.devices, trainer.devices),
            fp8 is not None,
            lambda tp: row_alignment(fp8, tp, torch.device("cuda")),
        )


def variants() -> Iterator[Variant]:
    for preset in PUBLISHED:
        for nodes in NODES.get(preset, SMALL):
            for gpu, name in GPUS.items():
                for precision in ("bf16",) if known_gpu(name).fp8 is None else ("bf16", "fp8"):
                    if (preset, nodes, precision) not in TOO_MUCH:
                        yield Variant(preset, gpu, nodes, precision)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="choose the layouts anew")
    args = parser.parse_args(argv)
    try:
        for variant in variants():
            if args.search:
                variant.path.parent.mkdir(parents=True, exist_ok=True)
                chosen = search_layout(variant)
                variant.path.write_text(layout_yaml(chosen), encoding="utf-8")
                print(f"{variant.path.relative_to(CONF)}: {chosen}, recompute {chosen.recompute}")
        for path, text in written().items():
            path.write_text(text, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@cache
def architecture(preset: str) -> Architecture:
    return read_config_file(CONFIGS / f"{PUBLISHED[preset]}.json")


def lengths(config: Config) -> Lengths:
    """As UltraFeedback's within a preset's limits; extreme are groups as long as may be, and long prompts alone."""
    model = config.model
    prompt, whole, batch = model.data.max_prompt_length, model.data.max_length, model.global_batch_size
    typical = []
    for group in ultrafeedback_like(batch, seed=0):
        kept = min(group.prompt, prompt)
        typical.append(GroupLengths(kept, tuple(min(length, whole - kept) for length in group.responses)))
    n = len(typical[0].responses)
    extremes = [even_groups(prompt, [length], n, batch) for length in (whole - prompt, 64)]
    return Lengths(typical, extremes)


def run_and_target(variant: Variant, config: Config) -> tuple[Run, Target]:
    """The run of a GPU, as `plan_run` has it."""
    model, target = config.model, variant.target(config)
    tp = model.tensor_model_parallel_size
    whole = tp * model.pipeline_model_parallel_size * model.context_parallel_size
    run = run_of(
        config, dp=max(1, target.machine.gpus // whole), transformer_engine=True, fused=True, attention="varlen",
        token_multiple=target.multiple_of(tp), two_passes=False,
    )  # fmt: skip
    return run, target


def search_layout(variant: Variant) -> Run:
    """The layout that the planner chooses."""
    config = variant.config("~layout")
    run, target = run_and_target(variant, config)
    return choose(architecture(variant.preset), run, target, lengths(config), EFFICIENCY)


def layout_yaml(run: Run, *head: str) -> str:
    """The file of a layout: keys of `model` that are not 1 by themselves, under lines of comment."""
    keys: dict[str, int | str | None] = {"tensor_model_parallel_size": run.tp}
    keys |= {
        name: size
        for name, size in (
            ("pipeline_model_parallel_size", run.pp),
            ("virtual_pipeline_model_parallel_size", run.vpp),
            ("context_parallel_size", run.cp),
        )
        if size > 1
    }
    recompute = run.recompute
    for name, value in (
        ("granularity", recompute.granularity),
        ("method", recompute.method),
        ("num_layers", recompute.num_layers),
    ):
        if value is not None:
            keys[f"activations_checkpoint_{name}"] = value
    lines = ["@package model", "Written by tools/plan_presets.py.", *head]
    return "".join(
        [*(f"# {line}\n" for line in lines), *(f"{key}: {value}\n" for key, value in keys.items())]
    )


@dataclass(frozen=True)
class Planned:
    """What the planner says of a variant's layout."""

    run: Run
    target: Target
    cost: Cost

    @property
    def gpus(self) -> str:
        return f"{self.target.machine.gpus} x {self.target.machine.gpu.name}"

    @property
    def memory(self) -> str:
        return f"{self.cost.memory / GIB:.1f} of {self.target.capacity / GIB:.1f}"

    @property
    def groups_per_second(self) -> str:
        return f"{self.cost.time.groups_per_second:.3g}"

    @property
    def mfu(self) -> str:
        return f"{self.cost.time.mfu(self.target.machine, self.target.fp8):.0%}"


@cache
def planned(variant: Variant) -> Planned:
    """Of the layout that is there."""
    config = variant.config()
    run, target = run_and_target(variant, config)
    cost = cost_of(architecture(variant.preset), run, target, lengths(config), EFFICIENCY)
    return Planned(run, target, cost)


def written() -> dict[Path, str]:
    """What the planner says of the layouts that are there, by file."""
    found, rows = {}, []
    for variant in variants():
        plan = planned(variant)
        found[variant.path] = layout_yaml(
            plan.run,
            f"{plan.gpus}, {variant.precision}: at most {plan.memory} GiB a GPU, "
            f"{plan.groups_per_second} groups/s expected",
        )
        named = (variant.preset, variant.nodes, variant.gpu, variant.precision)
        typical = f"{plan.cost.typical_memory / GIB:.1f}"
        rows.append(
            (*(f"`{name}`" for name in named), plan.gpus, str(plan.run), str(plan.run.recompute), typical,
             plan.memory, plan.groups_per_second, plan.mfu)
        )  # fmt: skip
    head = (
        "preset", "nodes=", "gpu=", "precision=", "GPUs", "layout", "recompute", "GiB a GPU", "at most", "groups/s",
        "MFU",
    )  # fmt: skip
    lines = [head, ("---",) * len(head), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    found[TABLE] = f"{before}{BEGIN}\n{table}\n{END}{after}"
    return found


if __name__ == "__main__":
    sys.exit(main())
