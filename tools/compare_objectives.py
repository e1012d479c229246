"""Train with a list of objectives on identical groups, order, steps and seeds, and compare what comes of it.

    python tools/compare_objectives.py conf/compare/objectives.yaml --output DIR [--members a,b] [--ranks N]
        [key=value ...]

The file names the members of the comparison (mpo_megatron/comparison/plan.py has its form). Each is a run of
examples/mpo_gpt.py for every seed, in DIR/MEMBER/seed-S; key=value overrides go to all of them. Run again, the command
keeps the runs that have finished. It ends with a table, also in DIR/comparison.csv and .md, and DIR/comparison.png.
"""

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpo_megatron.comparison import report
from mpo_megatron.comparison.execute import LOG, execute, finished
from mpo_megatron.comparison.plan import Run, plan_runs, read_comparison
from mpo_megatron.comparison.results import over_seeds
from mpo_megatron.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the comparison, such as conf/compare/objectives.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the tables")
    parser.add_argument("--members", help="only these, separated by commas")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run on this machine (1)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the main job, for all members"
    )
    args = parser.parse_intermixed_args(argv)
    if args.ranks < 1:
        parser.error(f"--ranks {args.ranks} must be 1 or more")
    members = [name.strip() for name in args.members.split(",")] if args.members else None
    try:
        runs = plan_runs(read_comparison(args.file), members, args.output, args.overrides)
        kept = {run: finished(run, args.ranks) for run in runs}
        make_folder(args.output)
        results, failed = run_all(kept, args.ranks, args.output / "cache")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    lines = [over_seeds(name, results, failed) for name in dict.fromkeys(run.member for run in runs)]
    steps = sorted({int(result["steps"]) for result in results.values()})
    title = (
        f"{args.file.stem}: held-out groups before and after {' or '.join(map(str, steps)) or 'the'} steps"
    )
    report.show(lines, title)
    report.write_csv(lines, args.output / "comparison.csv")
    report.write_markdown(lines, title, args.output / "comparison.md")
    print(f"table       {args.output / 'comparison.csv'}, {args.output / 'comparison.md'}")
    if results:
        report.plot(lines, title, args.output / "comparison.png")
        print(f"picture     {args.output / 'comparison.png'}")
    return 1 if failed else 0


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be made: {error.strerror}; give another folder") from error


def run_all(
    kept: Mapping[Run, Mapping[str, float] | None], ranks: int, cache: Path
) -> tuple[dict[Run, Mapping[str, float]], dict[Run, str]]:
    """Run what is not kept, one after the other, a line for each. Returns the figures, and the errors of others."""
    results, failed = {}, {}
    for number, (run, figures) in enumerate(kept.items(), 1):
        print(f"[{number}/{len(kept)}] {run}: ", end="", flush=True)
        began = time.perf_counter()
        try:
            results[run] = figures or execute(run, ranks, cache)
        except UserError as error:
            failed[run] = str(error)
            print(f"failed: {error} (its output: {run.folder / LOG})", flush=True)
            continue
        took = "kept" if figures else f"{time.perf_counter() - began:.0f} s"
        changes = (
            f"{label} {results[run][f'{key}_before']:{fmt}} to {results[run][f'{key}_after']:{fmt}}"
            for key, label, fmt in (("reward_margin", "margin", "+.4f"), ("accuracy", "accuracy", ".1%"))
        )
        print(", ".join([took, *changes]), flush=True)
    return results, failed


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)  # the run that is under way ends, too
    sys.exit(main())
