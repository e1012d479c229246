"""Compare where the float32 masters of bf16 weights begin: held-out margin, accuracy and distance, by learning rate.

    python tools/compare_masters.py --model FOLDER --output DIR [--seeds 3] [--rates 4e-5,4e-6,5e-7] [--steps 12]

Trains the main job (conf/mpo_gpt.yaml, on the example data) from one Hugging Face folder of float32 weights, each way
with each learning rate and seed, in a process of its own:

- float32: no bf16 at all
- rounded: masters begin at the bf16 weights (model.optim.master_weights=rounded)
- source: masters begin at the folder's float32 values (auto, from the folder as it is)
- dithered: masters begin within the rounding of the bf16 weights (auto, from a bf16 copy of the folder)
- stochastic: rounded masters, and after each step the bf16 weights are made of them by stochastic rounding

Every run's result is kept in DIR/runs: the command goes on where it was stopped. Tables and figure: DIR/masters.md and
DIR/masters.png.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mpo_megatron.benchmarks.report import Report, show, to_markdown
from mpo_megatron.conversion.hf_folder import SINGLE, copy_all_but_weights
from mpo_megatron.errors import UserError
from mpo_megatron.means import mean_and_error

WAYS = ("float32", "rounded", "source", "dithered", "stochastic")
# Figures of a run: key, title, how it is written.
COLUMNS = (
    ("reward_margin", "margin", "+.4f"),
    ("accuracy", "accuracy", ".3f"),
    ("distance", "distance, nats", ".3f"),
    ("moved", "weights moved", ".4f"),
)


@dataclass(frozen=True)
class Member:
    """One run of the comparison."""

    way: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.way}-lr{self.rate:g}-seed{self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="compare_masters.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, float32, one file")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=_rates, default=(4e-5, 4e-6, 5e-7), help="learning rates, by comma")
    parser.add_argument("--ways", type=_ways, default=WAYS, help=f"some of {','.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, in the one process")
    parser.add_argument("overrides", nargs="*", help="more of the main job's keys, as key=value")
    parsed = parser.parse_args(arguments)
    members = [
        Member(way, rate, seed)
        for rate in parsed.rates
        for seed in range(1, parsed.seeds + 1)
        for way in parsed.ways
    ]
    try:
        copy = bf16_copy(parsed.model, parsed.output / "bf16")
        for member in tqdm(members, unit="run", file=sys.stdout):
            run(member, parsed, copy)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = summary(parsed.output, members, parsed.steps)
    show(report)
    (parsed.output / "masters.md").write_text(to_markdown(report), encoding="utf-8")
    plot(read(parsed.output, members), parsed.output / "masters.png")
    return 0


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _ways(text: str) -> tuple[str, ...]:
    ways = tuple(text.split(","))
    if not set(ways) <= set(WAYS):
        raise argparse.ArgumentTypeError(f"choose of {', '.join(WAYS)}")
    return ways


def bf16_copy(source: Path, target: Path) -> Path:
    """A copy of a Hugging Face folder with its weights rounded to bf16.

    Raises:
        UserError: the folder has no model.safetensors, or one without float32 weights.
    """
    if target.is_dir():
        return target
    if not (source / SINGLE).is_file():
        raise UserError(f"{source} has no {SINGLE}; bash examples/quickstart.sh makes a folder that has")
    weights = load_file(source / SINGLE)
    if any(tensor.dtype != torch.float32 for tensor in weights.values()):
        raise UserError(f"{source} does not hold float32 weights, so nothing is lost in bf16")
    temporary = target.with_name(f"{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    copy_all_but_weights(source, temporary, torch.bfloat16)
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(rounded, temporary / SINGLE, {"format": "pt"})
    return temporary.rename(target)


def run(member: Member, parsed: argparse.Namespace, copy: Path) -> None:
    """Train one member in a process of its own, unless its result is there.

    Raises:
        UserError: it failed; the message names its log.
    """
    folder = parsed.output / "runs" / member.name
    if (folder / "result.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    overrides = [
        f"model.restore_from_path={parsed.model if member.way in ('float32', 'source') else copy}",
        f"trainer.precision={32 if member.way == 'float32' else 'bf16'}",
        f"model.optim.master_weights={'auto' if member.way in ('source', 'dithered') else 'rounded'}",
        f"model.optim.lr={member.rate}",
        f"trainer.seed={member.seed}",
        f"trainer.max_steps={parsed.steps}",
        # The stochastic rounding here is of one rank's own masters; without other ranks it is the same optimizer.
        "model.optim.distributed=false",
        f"model.data.cache_dir={parsed.output / 'cache'}",
        f"exp_manager.explicit_log_dir={folder / 'experiment'}",
        *parsed.overrides,
    ]
    wanted = {"overrides": overrides, "stochastic": member.way == "stochastic", "threads": parsed.threads}
    command = [sys.executable, "-m", "mpo_megatron.benchmarks.masters", json.dumps(wanted)]
    log = folder / "log.txt"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise UserError(f"{member.name} failed ({last}); see {log}")
    result = folder / "result.json"
    result.with_suffix(".partial").write_text(done.stdout.splitlines()[-1] + "\n", encoding="utf-8")
    result.with_suffix(".partial").rename(result)


Results = dict[tuple[str, float], list[dict[str, float]]]


def read(output: Path, members: Iterable[Member]) -> Results:
    """The results by way and learning rate, in the order of the seeds."""
    found: Results = {}
    for member in members:
        text = (output / "runs" / member.name / "result.json").read_text(encoding="utf-8")
        found.setdefault((member.way, member.rate), []).append(json.loads(text))
    return found


def summary(output: Path, members: Sequence[Member], steps: int) -> Report:
    """The table: a line for each learning rate and way, means over the seeds with standard errors."""
    rows, figures = [], {}
    for (way, rate), runs in read(output, members).items():
        cells = [f"{rate:g}", way]
        for key, _, style in COLUMNS:
            mean, error = mean_and_error([one[key] for one in runs])
            cells.append(f"{mean:{style}} ± {error or 0.0:{style.lstrip('+')}}")
            figures[f"{key}/{way}/{rate:g}"] = mean
        rows.append(cells)
    seeds = len({member.seed for member in members})
    return Report(
        benchmark="masters",
        columns=["learning rate", "masters", *(title for _, title, _ in COLUMNS)],
        rows=rows,
        figures=figures,
        settings={"steps": steps, "seeds": seeds},
        notes=[
            "margin, accuracy, distance: on held-out groups, at the end; mean over the seeds ± its standard error.",
            "distance: root mean square of log pi(y | x) - log pi_ref(y | x) over the responses.",
        ],
    )


def plot(found: Results, path: Path) -> None:
    """A PNG: margin, accuracy and distance of every way, a group of bars for each learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = list(dict.fromkeys(rate for _, rate in found))
    ways = list(dict.fromkeys(way for way, _ in found))
    figure, panels = pyplot.subplots(
        len(COLUMNS[:3]), len(rates), figsize=(3.6 * len(rates), 8), squeeze=False
    )
    for (key, title, _), row in zip(COLUMNS, panels, strict=False):
        for rate, panel in zip(rates, row, strict=True):
            for number, way in enumerate(ways):
                if (way, rate) in found:
                    mean, error = mean_and_error([one[key] for one in found[way, rate]])
                    panel.bar(way, mean, yerr=error, color=f"C{number}", capsize=3)
            _dress(panel, key, title, rate)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _dress(panel: Any, key: str, title: str, rate: float) -> None:
    panel.set_title(f"{title}, lr {rate:g}", fontsize=9)
    panel.tick_params(axis="x", rotation=30, labelsize=8)
    panel.tick_params(axis="y", labelsize=8)
    if key == "accuracy":
        panel.set_ylim(bottom=0.45)
        panel.axhline(0.5, color="grey", linewidth=0.8)


if __name__ == "__main__":
    sys.exit(main())
