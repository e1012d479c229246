"""Say what a run costs before it starts: memory of each pipeline stage, FLOPs, communication and groups per second.

    python tools/plan_run.py --model FOLDER --prompt 512 --responses 300,500 --n 4 --gpus 16 [key=value ...]
    python tools/plan_run.py --config conf/mpo_gpt.yaml --gpus 8 [key=value ...]      # lengths from its data
    python tools/plan_run.py --sizes layers=64,hidden=5120,ffn=27648,heads=40,kv_heads=8,vocab=152064 --gpus 64 --search

The model is a Hugging Face folder, its config.json, or sizes; layout and settings are keys of the main job
(model.tensor_model_parallel_size=4). --search tries every layout in their place. docs/planner.md says what is counted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from mpo_megatron import objectives
from mpo_megatron.config import Config, check_overrides, parse
from mpo_megatron.config.groups import compose_config
from mpo_megatron.conversion.hf_folder import model_folder
from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.model.architecture import FAMILIES, Architecture, check_layout, read_architecture
from mpo_megatron.model.fp8 import Fp8, row_alignment
from mpo_megatron.planning.communication import step_communication
from mpo_megatron.planning.configuration import run_of
from mpo_megatron.planning.flops import step_flops
from mpo_megatron.planning.hardware import Machine, known_gpu
from mpo_megatron.planning.memory import GIB, RESERVED, step_memory
from mpo_megatron.planning.performance import groups_per_second, step_time
from mpo_megatron.planning.profile import even_groups, plan_rows
from mpo_megatron.planning.run import Run
from mpo_megatron.planning.search import Found, search
from mpo_megatron.runtime.parallel import check_world
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.rows import group_lengths
from mpo_megatron.training.data import open_data, selection_of

SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "head_dim", "tied", "family")
# For what is not given as a file: no data are read and no weights.
NOTHING = "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    args = arguments(argv)
    try:
        config = read_config(args)
        a = read_model(args, config)
        plan(args, config, a, lengths(args, config))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a YAML of the main job")
    parser.add_argument("--model", help="Hugging Face folder, or a config.json")
    parser.add_argument("--sizes", help=f"{', '.join(SIZES)} as name=number, separated by commas")
    parser.add_argument(
        "--prompt", type=int, help="prompt tokens; without it lengths come from model.data.train"
    )
    parser.add_argument("--responses", default="512", help="response tokens, gone through in turn (512)")
    parser.add_argument("--n", type=int, default=4, help="responses of a prompt (4)")
    parser.add_argument("--gpus", type=int, default=8, help="(8)")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node (8)")
    parser.add_argument("--gpu", default="H100", help="a name of mpo_megatron/planning/hardware.py (H100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="at which to state groups per second (0.4)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.6,
        help="part of the peak that products reach, for expected times (0.6)",
    )
    parser.add_argument("--search", action="store_true", help="rank all layouts that fit")
    parser.add_argument("--top", type=int, default=15, help="layouts that the search prints (15)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the main job")
    args = parser.parse_intermixed_args(argv)
    for name in ("mfu", "efficiency"):
        if not 0 < getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)} must be above 0 and at most 1")
    for name in ("gpus", "per_node", "top"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be 1 or more")
    return args


def read_config(args: argparse.Namespace) -> Config:
    """The YAML with its overrides, or the defaults with them.

    Raises:
        ConfigError: as the main job has it.
    """
    overrides = list(args.overrides)
    if args.model or args.sizes:
        overrides.append(f"model.restore_from_path={args.model or NOTHING}")
    if args.prompt is not None:
        overrides.append(f"model.data.train={NOTHING}")
    if args.config is None:
        check_overrides(overrides)
        return parse(OmegaConf.from_dotlist(overrides))
    return compose_config(args.config, overrides)


def read_model(args: argparse.Namespace, config: Config) -> Architecture:
    if args.sizes:
        return architecture_of_sizes(args.sizes)
    path = Path(config.model.restore_from_path).expanduser()
    return read_architecture(path.parent if path.name == "config.json" else model_folder(str(path)))


def architecture_of_sizes(text: str) -> Architecture:
    """From `layers=64,hidden=5120,...`.

    Raises:
        ConfigError: a size is missing, unknown or no number.
    """
    given = dict(part.partition("=")[::2] for part in text.split(","))
    unknown = [name for name in given if name not in SIZES]
    missing = [name for name in SIZES[:6] if name not in given]
    if unknown or missing:
        problem = f"has no {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise ConfigError(f"--sizes {problem}; it takes {', '.join(SIZES)}")
    family = given.pop("family", "llama")
    if family not in FAMILIES or FAMILIES[family].experts:
        raise ConfigError(f"--sizes family={family} is no dense family; give --model, or leave it out")
    try:
        sizes = {name: int(value) for name, value in given.items()}
    except ValueError:
        raise ConfigError(f"--sizes {text}: sizes are whole numbers (tied is 0 or 1)") from None
    return Architecture(
        family=family,
        num_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        ffn_hidden_size=sizes["ffn"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes.get("head_dim", sizes["hidden"] // sizes["heads"]),
        vocab_size=sizes["vocab"],
        max_positions=2**30,
        norm_epsilon=1e-5,
        tied_embeddings=bool(sizes.get("tied", 0)),
        sliding_window=None,
        inverse_frequencies=(),
    )


def lengths(args: argparse.Namespace, config: Config) -> list[GroupLengths]:
    """Of a global batch: as given, or the first groups that the job would train on (tokenised, or from the cache)."""
    batch = config.model.global_batch_size
    if args.prompt is not None:
        try:
            responses = [int(part) for part in args.responses.split(",")]
        except ValueError:
            raise ConfigError(
                f"--responses {args.responses}: give whole numbers, separated by commas"
            ) from None
        return even_groups(args.prompt, responses, args.n, batch)
    entry = objectives.get(config.model.mpo.objective)
    found = open_data(config, selection_of(config, entry), config.model.data.train)
    return [group_lengths(found, i) for i in range(min(batch, len(found)))]


def plan(args: argparse.Namespace, config: Config, a: Architecture, groups: list[GroupLengths]) -> None:
    """Print the plan of the layout, or the search."""
    model, machine = config.model, Machine(known_gpu(args.gpu), args.gpus, args.per_node)
    fp8 = None if model.fp8 is None else Fp8(model.fp8, model.fp8_recipe)
    machine.gpu.peak(fp8 is not None)  # has it FP8 at all
    whole = (
        model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    )
    bf16 = config.precision == "bf16"

    def multiple_of(tp: int) -> int:
        return row_alignment(fp8, tp, torch.device("cuda"), model.pack.pad_to_multiple_of)

    run = run_of(
        config,
        dp=max(1, args.gpus // whole),
        transformer_engine=bf16 and model.transformer_impl != "local",
        fused=True,
        attention="varlen" if bf16 and model.attention_backend != "sdpa" else "sdpa",
        token_multiple=multiple_of(model.tensor_model_parallel_size),
        two_passes=objectives.get(model.mpo.objective).needs_global_batch,
    )
    console = Console(file=sys.stdout, width=max(Console().width, 120))
    say = lambda name, text: console.print(f"{name:<11} {text}", highlight=False)  # noqa: E731
    say("model", f"{a.num_parameters / 1e9:.2f}B parameters, {a.num_layers} layers, {a.family}")
    responses = sum(len(group.responses) for group in groups)
    say("step", f"{len(groups)} groups, {responses / len(groups):.1f} responses each")
    if args.search:
        if not bf16:
            raise ConfigError(
                f"trainer.precision={config.precision}: the search ranks by peaks of bf16 products; set it to bf16"
            )
        began = time.process_time()
        found = search(a, run, groups, machine, args.efficiency, multiple_of)
        say("search", f"{time.process_time() - began:.1f} s of processor time")
        show_search(console, found, machine, args.top, fp8 is not None)
        return
    check_world(args.gpus, run.tp, run.pp, run.cp, run.ep)
    check_layout(
        a, tp=run.tp, pp=run.pp, vpp=run.vpp, ep=run.ep, max_length=1, first_stage=run.first_stage,
        last_stage=run.last_stage, sequence_parallel=run.sequence_parallel,
    )  # fmt: skip
    show_run(console, say, a, run, groups, machine, args, fp8 is not None)


def show_run(
    console: Console, say: Any, a: Architecture, run: Run, groups: list[GroupLengths], machine: Machine,
    args: argparse.Namespace, fp8: bool,
) -> None:  # fmt: skip
    """Memory by stage, FLOPs, communication, time."""
    shape = plan_rows(groups, run, a.cost_model)
    layers = "Transformer Engine" if run.transformer_engine else "local"
    say("runs on", f"{machine.gpus} x {machine.gpu.name}, {run}, recompute {run.recompute}, {layers} layers")
    say("rows", f"{shape.rows_per_rank} on each of {run.dp} ranks, at most {shape.largest.row_tokens} tokens, "
        f"{shape.fill:.1%} of them used")  # fmt: skip
    table = Table(title="GiB on each GPU of a stage", title_justify="left")
    columns = (
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "temporary",
        "total",
        "of",
    )
    for column in columns:
        table.add_column(column, justify="right")
    stages = step_memory(a, run, shape)
    for number, stage in enumerate(stages):
        parts = (
            stage.weights,
            stage.gradients,
            stage.optimizer,
            stage.activations,
            stage.temporary,
            stage.total,
        )
        table.add_row(
            str(number), f"{stage.parameters:,}", *(f"{part / GIB:.2f}" for part in parts),
            f"{(machine.gpu.memory - RESERVED) / GIB:.1f}",
        )  # fmt: skip
    console.print(table)
    if max(stage.total for stage in stages) > machine.gpu.memory - RESERVED:
        say("", f"does not fit: {RESERVED / GIB:.0f} GiB are kept for CUDA, NCCL and fragments; try --search")
    flops = step_flops(a, run, shape)
    say("FLOPs", f"{flops.shared:.4g} a step with shared prompts, {flops.repeated:.4g} with repeated ones "
        f"({flops.repeated / flops.shared:.2f} x); computed {flops.computed:.4g}")  # fmt: skip
    busiest = max(
        range(run.pp), key=lambda s: sum(t.sent for t in step_communication(a, run, shape, s).values())
    )
    traffic = step_communication(a, run, shape, busiest)
    table = Table(title=f"communication of a rank of stage {busiest} in a step", title_justify="left")
    for column in ("kind", "calls", "payload, GB", "sent, GB"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, found in sorted(traffic.items(), key=lambda item: -item[1].sent):
        table.add_row(str(kind), str(found.calls), f"{found.payload / 1e9:.3f}", f"{found.sent / 1e9:.3f}")
    console.print(table)
    if run.element == 4:
        say("time", "left out: the table of chips has no peak of float32 products")
        return
    expected = step_time(a, run, shape, machine, args.efficiency)
    stated = groups_per_second(flops.model(run.shared_prompt), len(groups), machine, args.mfu, fp8)
    say("at", f"{args.mfu:.0%} MFU: {stated:.2f} groups/s")
    say("expected", f"{expected.groups_per_second:.2f} groups/s, {expected.mfu(machine, fp8):.1%} MFU, "
        f"with products at {args.efficiency:.0%} of the peak: {expected.seconds:.2f} s a step, "
        f"bubble {expected.bubble_fraction:.1%}, "
        f"communication {expected.communication / expected.seconds:.1%}")  # fmt: skip


def show_search(console: Console, found: Found, machine: Machine, top: int, fp8: bool) -> None:
    """The best layouts, and why others do not fit."""
    table = Table(
        title=f"{len(found.candidates)} layouts fit {machine.gpus} x {machine.gpu.name}; the best",
        title_justify="left",
    )
    columns = ("layout", "recompute", "rows", "GiB", "bubble", "communication", "groups/s", "MFU")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for one in found.candidates[:top]:
        table.add_row(
            str(one.run), str(one.run.recompute), str(one.shape.rows_per_rank), f"{one.memory.total / GIB:.1f}",
            f"{one.time.bubble_fraction:.1%}", f"{one.time.communication / one.time.seconds:.1%}",
            f"{one.time.groups_per_second:.2f}", f"{one.time.mfu(machine, fp8):.1%}",
        )  # fmt: skip
    console.print(table)
    if not found.refused:
        return
    table = Table(title="those that do not fit", title_justify="left")
    for column in ("layouts", "why", "nearest"):
        table.add_column(column, justify="right" if column == "layouts" else "left")
    for refused in found.refused:
        table.add_row(str(refused.count), refused.reason, refused.example)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
