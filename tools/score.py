"""Scores sampled groups by their verifiable constraints and prints what came out.

    python tools/score.py --input groups.jsonl --output examples/data/train.jsonl

The last line printed is JSON with the figures, for scripts. The formula is in mpo_megatron/rollout/rewards.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.parts import begin, digest_of
from mpo_megatron.rollout.records import Record, read_groups
from mpo_megatron.rollout.rewards import USABLE_SPREAD, Summary, summarise, summarise_by_type
from mpo_megatron.rollout.scoring import start_constraints, with_scores
from mpo_megatron.rollout.work import work_off

GROUPS_PER_BATCH = 64


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        groups = read_groups(args.input)
        print_summary(score(groups, args) if args.output else score_in_memory(groups))
    except (UserError, OSError) as error:
        sys.exit(f"score.py: {error}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score sampled groups by their verifiable constraints (0 to 10)."
    )
    parser.add_argument("--input", type=Path, required=True, help="JSONL that tools/generate.py wrote")
    parser.add_argument(
        "--output", type=Path, help='JSONL to write: the same groups, each response with its "score"'
    )
    parser.add_argument("--summary-only", action="store_true", help="print the figures, write nothing")
    args = parser.parse_args(argv)
    if args.summary_only:
        args.output = None
    elif args.output is None:
        parser.error("--output is missing; give it, or --summary-only to write nothing")
    return args


def score(groups: Sequence[Record], args: argparse.Namespace) -> list[Record]:
    """Score into --output, going on where an earlier start was cut off. Returns the scored groups."""
    scored: list[Record] = []

    def assemble(group: Record, scores: Sequence[float]) -> Record:
        scored.append(with_scores(group, scores))
        return scored[-1]

    with begin(args.output, {}, {group["id"]: digest_of(group) for group in groups}) as parts:
        finished = parts.finished()
        waiting = [group for group in groups if group["id"] not in finished]
        batches = [
            waiting[first : first + GROUPS_PER_BATCH] for first in range(0, len(waiting), GROUPS_PER_BATCH)
        ]
        work_off(parts, batches, start_constraints, processes=1, total=len(groups), unit="group")
        parts.merge(args.output, groups, assemble)
    return scored


def score_in_memory(groups: list[Record]) -> list[Record]:
    values, _ = start_constraints(0)(groups)
    return [with_scores(group, scores) for group, scores in zip(groups, values, strict=True)]


def print_summary(groups: Sequence[Record]) -> None:
    total = summarise(groups)
    print(f"{'constraint':<20} {'groups':>6}  {'mean score':>14}  {'usable':>6}  {'finished':>8}")
    for kind, summary in {"all": total, **summarise_by_type(groups)}.items():
        print(f"{kind:<20} {summary.groups:>6}  {_mean(summary):>14}  {summary.usable_share:>6.0%}  "
              f"{summary.finished_share:>8.0%}")  # fmt: skip
    print(
        f"usable: best and worst score at least {USABLE_SPREAD} apart; finished: responses that the limit did not cut"
    )
    print(
        json.dumps(
            {
                "groups": total.groups,
                "mean_score": round(total.mean_score, 4),
                "standard_error": None if total.standard_error is None else round(total.standard_error, 4),
                "usable_share": round(total.usable_share, 4),
                "finished_share": round(total.finished_share, 4),
            }
        )
    )


def _mean(summary: Summary) -> str:
    error = "" if summary.standard_error is None else f" ± {summary.standard_error:.3f}"
    return f"{summary.mean_score:.3f}{error}"


if __name__ == "__main__":
    main()
