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
from mpo_megatron.rollout.records import Record, read_groups, write_jsonl
from mpo_megatron.rollout.rewards import USABLE_SPREAD, Summary, summarise, summarise_by_type, verified_score


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        groups = [score_group(group) for group in read_groups(args.input)]
        if not args.summary_only:
            write_jsonl(args.output, groups)
        print_summary(groups)
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
    if args.output is None and not args.summary_only:
        parser.error("--output is missing; give it, or --summary-only to write nothing")
    return args


def score_group(group: Record) -> Record:
    """The group with a "score" in every response, rounded to three decimals."""
    responses = []
    for response in group["responses"]:
        score = verified_score(
            response["text"],
            group["constraints"],
            prompt=group["prompt"],
            finished=response["finish_reason"] == "stop",
            topic_words=group.get("topic_words", ()),
        )
        responses.append(response | {"score": round(score, 3)})
    return group | {"responses": responses}


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
