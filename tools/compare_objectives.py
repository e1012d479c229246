"""Train with a list of objectives on identical groups, order, steps and seeds, and compare what comes of it.

    python tools/compare_objectives.py conf/compare/objectives.yaml --output DIR [--members a,b] [--ranks N]
        [--max-hours H] [key=value ...]

The file names the members of the comparison (mpo_megatron/comparison/plan.py has its form). Each is a run of
examples/mpo_gpt.py for every seed, in DIR/MEMBER/seed-S; key=value overrides go to all of them. Run again, the command
keeps what has finished and goes on. It ends with tables, also in DIR/comparison.csv, comparison-paired.csv and
comparison.md, and with DIR/comparison.png; a sweep has a picture for each of its axes, DIR/sweep-AXIS.png.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from mpo_megatron.comparison import pictures, report
from mpo_megatron.comparison.execute import EXPERIMENT, LOG, execute, finished, model_of
from mpo_megatron.comparison.held_out import read_held_out
from mpo_megatron.comparison.paired import difference
from mpo_megatron.comparison.plan import Comparison, Run, plan_runs, read_comparison
from mpo_megatron.comparison.results import over_seeds
from mpo_megatron.comparison.samples import LOG as SAMPLES_LOG
from mpo_megatron.comparison.samples import START, Samples, discard, is_sampled, sample
from mpo_megatron.comparison.sweep import lines_of
from mpo_megatron.errors import UserError
from mpo_megatron.runtime.commands import interrupt_on_signals


@dataclass
class Found:
    """What the runs of a comparison came to.

    Attributes:
        results: figures of the runs that have ended well.
        failed: errors of runs, or of their samples.
        start: mean score of the starting model's samples, by prompt; None: it is not sampled.
        scores: the same of each run that was sampled.
        left: runs that there was no time for, or no time to sample.
    """

    results: dict[Run, Mapping[str, float]] = field(default_factory=dict)
    failed: dict[Run, str] = field(default_factory=dict)
    start: dict[str, float] | None = None
    scores: dict[Run, dict[str, float]] = field(default_factory=dict)
    left: list[Run] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if a run failed."""
    args = arguments(argv)
    members = [name.strip() for name in args.members.split(",")] if args.members else None
    try:
        comparison = read_comparison(args.file)
        runs = plan_runs(comparison, members, args.output, args.overrides)
        kept = {run: finished(run, args.ranks) for run in runs}
        with held(args.output):
            found = run_all(comparison, kept, args)
            tell(comparison, runs, found, args.file.stem, args.output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    if found.left:
        print(f"{len(found.left)} of {len(runs)} runs are left; the same command goes on with them")
    return 1 if found.failed else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the comparison, such as conf/compare/objectives.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the tables")
    parser.add_argument("--members", help="only these, separated by commas")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run on this machine (1)")
    parser.add_argument(
        "--max-hours", type=float, default=float("inf"), help="begin no run after so long (no limit)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the main job, for all members"
    )
    args = parser.parse_intermixed_args(argv)
    if args.ranks < 1:
        parser.error(f"--ranks {args.ranks} must be 1 or more")
    if not args.max_hours >= 0:
        parser.error(f"--max-hours {args.max_hours} must be 0 or more")
    return args


@contextmanager
def held(path: Path) -> Iterator[None]:
    """The folder of the output, made if it is not there, for this command alone."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be made: {error.strerror}; give another folder") from error
    try:
        with FileLock(path / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another comparison runs in {path}; wait for it, or give another --output") from None


def run_all(
    comparison: Comparison, kept: Mapping[Run, Mapping[str, float] | None], args: argparse.Namespace
) -> Found:
    """Run what is not kept, one after the other, a line for each; sample the models that are to be.

    Raises:
        UserError: the starting model cannot be sampled.
    """
    found, began = Found(), time.perf_counter()
    if comparison.samples is not None and any(run.seed in comparison.samples.seeds for run in kept):
        print("samples of the starting model: ", end="", flush=True)
        try:
            found.start = sample(comparison.samples, next(iter(kept)).start, args.output / START)
        except UserError:
            print("failed", flush=True)
            raise
        print(f"{sum(found.start.values()) / len(found.start):.3f} on {len(found.start)} prompts", flush=True)
    for number, (run, figures) in enumerate(kept.items(), 1):
        late = time.perf_counter() - began > 3600 * args.max_hours
        wanted = comparison.samples is not None and run.seed in comparison.samples.seeds
        if late and (figures is None or (wanted and not is_sampled(run.folder))):
            found.left.append(run)
            if figures is not None:
                found.results[run] = figures
            continue
        print(f"[{number}/{len(kept)}] {run}: ", end="", flush=True)
        run_one(run, figures, comparison.samples if wanted else None, args, found)
    return found


def run_one(
    run: Run,
    kept: Mapping[str, float] | None,
    samples: Samples | None,
    args: argparse.Namespace,
    found: Found,
) -> None:
    """Run, and sample the model, if it is to be; say in the rest of a line what came of it."""
    began = time.perf_counter()
    log = LOG
    try:
        result = kept or execute(run, args.ranks, args.output / "cache", sampled=samples is not None)
        found.results[run] = result
        took = ["kept" if kept else f"{time.perf_counter() - began:.0f} s"]
        log = SAMPLES_LOG
        if samples is not None:
            found.scores[run] = sample(samples, model_of(run), run.folder)
            if not run.keeps_model:
                discard(model_of(run))
    except UserError as error:
        found.failed[run] = str(error)
        print(f"failed: {error} (its output: {run.folder / log})", flush=True)
        return
    changes = [
        f"{label} {result[f'{key}_before']:{fmt}} to {result[f'{key}_after']:{fmt}}"
        for key, label, fmt in (("reward_margin", "margin", "+.4f"), ("accuracy", "accuracy", ".1%"))
    ]
    if run in found.scores:
        changes.append(f"score {sum(found.scores[run].values()) / len(found.scores[run]):.3f}")
    print(", ".join([*took, *changes]), flush=True)


def tell(comparison: Comparison, runs: Sequence[Run], found: Found, name: str, output: Path) -> None:
    """Print and write the tables and the pictures."""
    members = list(dict.fromkeys(run.member for run in runs))
    lines = {
        member: over_seeds(member, found.results, found.failed, found.start, found.scores)
        for member in members
        if any(run.member == member for run in (*found.results, *found.failed))
    }
    steps = sorted({int(result["steps"]) for result in found.results.values()})
    title = f"{name}: held-out groups before and after {' or '.join(map(str, steps)) or 'the'} steps"
    pairs = compare(comparison, members, found)
    grids = [report.table(list(lines.values()), title, list(map(str, found.left)))]
    if pairs:
        grids.append(report.paired_table(pairs))
    for grid in grids:
        report.show(grid)
    written = [output / "comparison.csv", output / "comparison.md"]
    report.write_csv(list(lines.values()), written[0])
    report.write_markdown(grids, written[1])
    if pairs:
        written.append(output / "comparison-paired.csv")
        report.write_paired_csv(pairs, written[-1])
    print(f"tables      {', '.join(map(str, written))}")
    if not found.results:
        return
    drawn = [output / "comparison.png"]
    pictures.plot(list(lines.values()), title, drawn[0])
    points = {member: (comparison.members[member].base, comparison.members[member].point) for member in lines}
    for axis in dict.fromkeys(axis for _, point in points.values() for axis in point):
        drawn.append(output / re.sub(r"[^\w.-]", "_", f"sweep-{axis}.png"))
        pictures.plot_sweep(lines, axis, dict(lines_of(points, axis)), title, drawn[-1])
    print(f"pictures    {', '.join(map(str, drawn))}")


def compare(comparison: Comparison, members: Sequence[str], found: Found) -> list[report.Pair]:
    """Each member against the baseline at the same point of the sweep."""
    by_member: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for run in found.results:
        of = by_member.setdefault(run.member, {"accuracy": {}, "margin": {}, "score": {}})
        groups = read_held_out(run.folder / EXPERIMENT)
        of["accuracy"][run.seed] = dict(zip(groups.ids, groups.accuracy.tolist(), strict=True))
        of["margin"][run.seed] = dict(zip(groups.ids, groups.margin.tolist(), strict=True))
        if run in found.scores:
            of["score"][run.seed] = found.scores[run]
    pairs = []
    for name in members:
        member = comparison.members[name]
        baseline = next(
            other
            for other, of in comparison.members.items()
            if (of.base, of.point) == (comparison.baseline, member.point)
        )
        if baseline != name and name in by_member and baseline in by_member:
            all_of = {
                key: difference(by_member[name][key], by_member[baseline][key]) for key in by_member[name]
            }
            pairs.append(
                report.Pair(name, baseline, {key: of for key, of in all_of.items() if of is not None})
            )
    return pairs


if __name__ == "__main__":
    interrupt_on_signals()
    sys.exit(main())
