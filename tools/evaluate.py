"""Benchmarks' questions to prompts, sampled answers to the files of the benchmarks, and two models in figures.

    python tools/evaluate.py prompts alpaca-eval --questions alpaca_eval.json --output prompts.jsonl
    python tools/evaluate.py answers alpaca-eval --questions alpaca_eval.json --answers groups.jsonl \\
        --model-name NAME --output outputs.json

    python tools/evaluate.py report --base base.scored.jsonl --trained trained.scored.jsonl
    python tools/evaluate.py join --base base.jsonl --trained trained.jsonl --output both.jsonl
    python tools/evaluate.py report --together both.scored.jsonl

The benchmarks are alpaca-eval, arena-hard and mt-bench. What lies between is sampled by tools/generate.py and scored by
tools/score.py. The last line that `report` prints is JSON with the figures, for scripts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mpo_megatron.errors import UserError
from mpo_megatron.evaluation import alpaca_eval, arena_hard, mt_bench
from mpo_megatron.evaluation.pairs import check_comparable, joined, matched, parted, read_scored
from mpo_megatron.evaluation.questions import read_questions
from mpo_megatron.rollout.records import read_groups, write_json, write_jsonl

if TYPE_CHECKING:
    from mpo_megatron.evaluation.report import Report
    from mpo_megatron.evaluation.win_rate import Estimate

BENCHMARKS = {"alpaca-eval": alpaca_eval, "arena-hard": arena_hard, "mt-bench": mt_bench}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    commands = {"prompts": write_prompts, "answers": write_answers, "join": join, "report": print_report}
    try:
        commands[args.command](args)
    except (UserError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export answers to benchmarks; compare two models' scored answers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    prompts = commands.add_parser("prompts", help="a benchmark's questions as prompts for tools/generate.py")
    _add_questions(prompts)
    prompts.add_argument(
        "--first-answers",
        type=Path,
        metavar="FILE",
        help="mt-bench: the sampled first answers; makes the prompts of the second turn",
    )
    prompts.add_argument("--output", type=Path, required=True, help="JSONL to write")

    answers = commands.add_parser("answers", help="sampled answers as the benchmark's own tool reads them")
    _add_questions(answers)
    answers.add_argument(
        "--answers",
        type=Path,
        required=True,
        help="JSONL that tools/generate.py wrote; of mt-bench that of the second turn",
    )
    answers.add_argument("--model-name", required=True, help="what the benchmark's tables call the model")
    answers.add_argument("--output", type=Path, required=True, help="file to write")
    answers.add_argument(
        "--without-style", action="store_true", help="arena-hard: leave out what its style control goes by"
    )

    together = commands.add_parser(
        "join", help="both models' answers in one file, for a pair ranker to score"
    )
    together.add_argument("--base", type=Path, required=True, help="samples of the base model")
    together.add_argument("--trained", type=Path, required=True, help="samples of the trained model")
    together.add_argument("--output", type=Path, required=True, help="JSONL to write")

    report = commands.add_parser(
        "report", help="reward, length and win rate of a model against its base model"
    )
    report.add_argument("--base", type=Path, help="scored samples of the base model")
    report.add_argument(
        "--trained", type=Path, help="scored samples of the trained model, for the same prompts"
    )
    report.add_argument("--together", type=Path, help="instead of both: the scored file that `join` wrote")
    report.add_argument(
        "--bradley-terry",
        action="store_true",
        help="a win counts as the probability that the scores, taken for logits, give it (reward models, PairRM)",
    )
    args = parser.parse_args(argv)
    if args.command == "report" and (args.together is None) == (args.base is None or args.trained is None):
        parser.error("report needs --base and --trained, or --together alone")
    return args


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--questions", type=Path, required=True, help="the benchmark's own file of questions")


def write_prompts(args: argparse.Namespace) -> None:
    questions = read_questions(args.questions, BENCHMARKS[args.benchmark].FIELDS)
    if args.benchmark != "mt-bench":
        if args.first_answers is not None:
            raise UserError(f"--first-answers is for mt-bench; {args.benchmark} has one turn: leave it out")
        records = BENCHMARKS[args.benchmark].prompts(questions)
    elif args.first_answers is None:
        records = mt_bench.first_turns(questions)
    else:
        records = mt_bench.second_turns(questions, read_groups(args.first_answers, constraints=False))
    write_jsonl(args.output, records)
    print(f"{args.output}: {len(records)} prompts")


def write_answers(args: argparse.Namespace) -> None:
    questions = read_questions(args.questions, BENCHMARKS[args.benchmark].FIELDS)
    groups = read_groups(args.answers, constraints=False)
    sampled_at = args.answers.stat().st_mtime
    if args.benchmark == "alpaca-eval":
        write_json(args.output, alpaca_eval.outputs(questions, groups, args.model_name))
    elif args.benchmark == "arena-hard":
        count_tokens = None if args.without_style else arena_hard.token_counter()
        lines = arena_hard.answers(questions, groups, args.model_name, sampled_at, count_tokens)
        write_jsonl(args.output, lines)
    else:
        write_jsonl(args.output, mt_bench.answers(questions, groups, args.model_name, sampled_at))
    print(f"{args.output}: {len(questions)} answers of {args.model_name}")


def join(args: argparse.Namespace) -> None:
    base, trained = (read_groups(path, constraints=False) for path in (args.base, args.trained))
    groups = joined(matched(base, trained))
    write_jsonl(args.output, groups)
    print(f"{args.output}: {len(groups)} groups with the answers of both models")


def print_report(args: argparse.Namespace) -> None:
    try:
        from mpo_megatron.evaluation.report import report
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}: pip install 'mpo-megatron[eval]'") from None
    if args.together is not None:
        pairs = parted(read_scored(args.together))
    else:
        pairs = matched(read_scored(args.base), read_scored(args.trained))
        check_comparable(pairs)
    found = report(pairs, bradley_terry=args.bradley_terry)
    print_table(found)
    print(json.dumps(asdict(found)))


def print_table(found: "Report") -> None:
    table = Table(
        title=f"{found.prompts} prompts; in brackets 95% confidence intervals", title_justify="left"
    )
    for column in ("", "base", "trained", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for name, figure in (("reward", found.reward), ("characters", found.characters)):
        digits = 3 if name == "reward" else 0
        table.add_row(
            name,
            *(_shown(estimate, f".{digits}f") for estimate in (figure.base, figure.trained)),
            _shown(figure.difference, f"+.{digits}f"),
        )
    table.add_row("finished", f"{found.base_finished_share:.0%}", f"{found.trained_finished_share:.0%}", "")
    console = Console(file=sys.stdout)
    # A figure and its interval on a line, also where the output goes to a file.
    console.width = max(console.width, 100)
    console.print(table)
    console.print(f"win rate of the trained model: {_shown(found.win_rate, '.1%')}")
    controlled = found.length_controlled
    shown = _shown(controlled.rate, ".1%") if controlled.rate else f"no estimate: {controlled.reason}"
    console.print(f"at equal length: {shown}")


def _shown(estimate: "Estimate", form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


if __name__ == "__main__":
    main()
