"""Scores sampled groups and prints what came out.

    python tools/score.py --input groups.jsonl --output scored.jsonl                 # by verifiable constraints
    python tools/score.py ... --scorer reward-model --model FOLDER                   # sequence classification, ArmoRM
    python tools/score.py ... --scorer pair-ranker --model FOLDER                    # PairRM
    python tools/score.py ... --scorer judge --judge-url http://host/v1 --judge-model NAME
    python tools/score.py ... --scorer function --function my_rewards.score

What is finished is kept in OUTPUT.parts: a run that was killed goes on there when it is started again. The last line
printed is JSON with the figures, for scripts. The score by constraints is that of mpo_megatron/rollout/rewards.py.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.options import add_placement, check_at_least_one
from mpo_megatron.rollout.parts import begin, digest_of, digest_of_folder
from mpo_megatron.rollout.records import Record, read_groups
from mpo_megatron.rollout.rewards import USABLE_SPREAD, Summary, summarise, summarise_by_type
from mpo_megatron.rollout.scoring import (
    load_function,
    source_digest,
    start_constraints,
    start_function,
    start_reward_model,
    with_scores,
)
from mpo_megatron.rollout.work import Failure, StartWorker, work_off

SCORERS = ("constraints", "reward-model", "pair-ranker", "judge", "function")
GROUPS_PER_BATCH = 64


@dataclass(frozen=True)
class Scorer:
    """How a worker is made, and what its scores depend on."""

    start: StartWorker
    settings: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        groups = read_groups(args.input, constraints=args.scorer == "constraints")
        with scorer_of(args) as scorer:
            print_summary(score(groups, scorer, args) if args.output else score_in_memory(groups, scorer))
    except (UserError, OSError) as error:
        sys.exit(f"score.py: {error}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score sampled groups: by their verifiable constraints (0 to 10), or as --scorer says."
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="JSONL that tools/generate.py wrote")
    add("--output", type=Path, help='JSONL to write: the same groups, each response with its "score"')
    add("--summary-only", action="store_true", help="print the figures, write nothing")
    add("--scorer", choices=SCORERS, default="constraints", help="what scores (default %(default)s)")
    add("--leave-out-failed", action="store_true", help="write without the groups that could not be scored")
    _add_models(parser.add_argument_group("reward-model and pair-ranker"))
    _add_judge(parser.add_argument_group("judge"))
    parser.add_argument_group("function").add_argument(
        "--function",
        metavar="MODULE.NAME",
        help="Python function from a group to the scores of its responses, such as my_rewards.score",
    )
    args = parser.parse_args(argv)
    if args.summary_only:
        args.output = None
    elif args.output is None:
        parser.error("--output is missing; give it, or --summary-only to write nothing")
    needed = {"reward-model": ["model"], "pair-ranker": ["model"], "function": ["function"],
              "judge": ["judge_url", "judge_model"]}  # fmt: skip
    for name in needed.get(args.scorer, []):
        if getattr(args, name) is None:
            parser.error(f"--scorer {args.scorer} needs --{name.replace('_', '-')}")
    return args


def _add_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", type=Path, help="Hugging Face folder")
    add_placement(add, "groups")
    add(
        "--batch-tokens",
        type=int,
        default=8192,
        help="tokens that go through the model together, padding included (default %(default)s)",
    )
    add("--max-length", type=int, default=None, help="longest sequence in tokens; longer ones have no score")
    add(
        "--objective-weights",
        metavar="W,W,...",
        type=lambda text: [float(weight) for weight in text.split(",")],
        help="the score's share of each output of a head with several",
    )


def _add_judge(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--judge-url", help='endpoint of the OpenAI protocol, up to and without "/chat/completions"')
    add("--judge-model", help="the model's name there")
    add(
        "--judge-key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key (default %(default)s)",
    )
    add(
        "--judge-prompt", type=Path, help="text with {prompt} and {response}; its answer must hold 'score: N'"
    )
    add("--judge-range", type=float, nargs=2, default=[1.0, 10.0], metavar=("LOW", "HIGH"), help="of scores")
    add(
        "--judge-options",
        type=json.loads,
        default={"temperature": 0},
        metavar="JSON",
        help='further fields of a request (default {"temperature": 0})',
    )
    add("--judge-concurrency", type=int, default=8, help="requests at a time (default %(default)s)")
    add("--judge-rate", type=float, default=0, help="requests begun in a minute at most; 0 for no limit")
    add("--judge-attempts", type=int, default=6, help="of each response (default %(default)s)")
    add("--judge-timeout", type=float, default=120, help="seconds for a request (default %(default)s)")
    add(
        "--judge-first-wait",
        type=float,
        default=1,
        help="seconds before the second attempt; doubles (default %(default)s)",
    )
    add(
        "--judge-prices",
        type=float,
        nargs=2,
        metavar=("PROMPT", "ANSWER"),
        help="US dollars for a million tokens of prompts and of answers, to show the cost",
    )
    add(
        "--judge-cache",
        type=Path,
        help="SQLite file of answers (default: judge-answers.sqlite by the output)",
    )


@contextmanager
def scorer_of(args: argparse.Namespace) -> Iterator[Scorer]:
    """The scorer that the command line asks for."""
    settings: dict[str, Any] = {"--scorer": args.scorer}
    if args.scorer == "judge":
        with _judge(args) as scorer:
            yield scorer
    elif args.scorer == "function":
        load_function(args.function)  # before anything is written
        settings |= {
            "--function": args.function,
            "the module of --function": source_digest(args.function),
        }
        yield Scorer(partial(start_function, args.function), settings)
    elif args.scorer == "constraints":
        yield Scorer(start_constraints, settings)
    else:
        yield _model_scorer(args, settings)


def _model_scorer(args: argparse.Namespace, settings: dict[str, Any]) -> Scorer:
    if not (args.model / "config.json").is_file():
        raise UserError(f"--model {args.model} has no config.json; give a Hugging Face model's folder")
    check_at_least_one(args, "--batch-tokens", "--processes", "--max-length")
    made_with = {"dtype": args.dtype, "batch_tokens": args.batch_tokens, "max_length": args.max_length}
    if args.scorer == "reward-model":
        made_with["weights"] = args.objective_weights
    elif args.objective_weights:
        raise UserError("--objective-weights are for --scorer reward-model; leave them out")
    start = partial(start_reward_model, args.scorer, str(args.model), args.device, args.processes, made_with)
    return Scorer(
        start,
        settings
        | {
            "the model in --model": digest_of_folder(args.model),
            "--dtype": args.dtype,
            "--max-length": args.max_length,
            "--objective-weights": args.objective_weights,
        },
    )


@contextmanager
def _judge(args: argparse.Namespace) -> Iterator[Scorer]:
    try:
        from mpo_megatron.rollout.judge import PROMPT, Judge, JudgeSettings
    except ModuleNotFoundError as error:
        raise UserError(f"--scorer judge needs {error.name}: pip install 'mpo-megatron[judge]'") from None
    if not isinstance(args.judge_options, dict):
        raise UserError(
            f"--judge-options {args.judge_options!r} must be a JSON object of fields of a request"
        )
    lowest, highest = args.judge_range
    asked = JudgeSettings(
        url=args.judge_url,
        model=args.judge_model,
        key=os.environ.get(args.judge_key_variable),
        prompt=args.judge_prompt.read_text(encoding="utf-8") if args.judge_prompt else PROMPT,
        lowest=lowest,
        highest=highest,
        options=args.judge_options,
        concurrency=args.judge_concurrency,
        per_minute=args.judge_rate,
        attempts=args.judge_attempts,
        timeout=args.judge_timeout,
        first_wait=args.judge_first_wait,
    )
    judge = Judge(asked, args.judge_cache or (args.output or args.input).with_name("judge-answers.sqlite"))
    # One process: the requests are what takes the time.
    args.processes = 1
    try:
        yield Scorer(
            lambda number: judge,
            {
                "--scorer": args.scorer,
                "--judge-url": asked.url,
                "--judge-model": asked.model,
                "--judge-prompt": asked.prompt,
                "--judge-range": [lowest, highest],
                "--judge-options": args.judge_options,
            },
        )
    finally:
        judge.close()
        used = judge.usage
        cost = f", {used.cost(tuple(args.judge_prices)):.4f} USD" if args.judge_prices else ""
        print(
            f"judge: {used.answers} answers and {used.from_cache} from the cache, {used.tried_again} requests again, "
            f"{used.prompt_tokens} prompt and {used.answer_tokens} answer tokens{cost}"
        )


def score(groups: list[Record], scorer: Scorer, args: argparse.Namespace) -> list[Record]:
    """Score into --output, going on where an earlier start was cut off. Returns the scored groups."""
    scored: list[Record] = []

    def assemble(group: Record, scores: Sequence[float]) -> Record:
        scored.append(with_scores(group, scores))
        return scored[-1]

    inputs = {group["id"]: digest_of(group) for group in groups}
    with begin(args.output, scorer.settings, inputs) as parts:
        finished = parts.finished()
        waiting = [group for group in groups if group["id"] not in finished]
        # Those of like length together; the longest first, as what does not fit in memory fails at once.
        waiting.sort(key=lambda group: -max(len(response["text"]) for response in group["responses"]))
        batches = [
            waiting[first : first + GROUPS_PER_BATCH] for first in range(0, len(waiting), GROUPS_PER_BATCH)
        ]
        failures = work_off(
            parts, batches, scorer.start, processes=args.processes, total=len(groups), unit="group"
        )
        if failures:
            what = _failed(failures, len(groups))
            if not args.leave_out_failed or len(failures) == len(groups):
                raise UserError(
                    f"{what}; the others are kept: start again to try these once more, or with --leave-out-failed"
                )
            print(f"left out: {what}")
        parts.merge(args.output, [group for group in groups if group["id"] not in failures], assemble)
    return scored


def score_in_memory(groups: list[Record], scorer: Scorer) -> list[Record]:
    values, _ = scorer.start(0)(groups)
    failures = {
        group["id"]: value for group, value in zip(groups, values, strict=True) if isinstance(value, Failure)
    }
    if failures:
        raise UserError(_failed(failures, len(groups)))
    return [with_scores(group, scores) for group, scores in zip(groups, values, strict=True)]


def _failed(failures: dict[str, Failure], groups: int) -> str:
    name, failure = next(iter(failures.items()))
    return f"{len(failures)} of {groups} groups have no score, first {name!r}: {failure.reason}"


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
