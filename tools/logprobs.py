"""The log-probability that a chat model gives to each response of sampled groups, and its tokens.

    python tools/logprobs.py --model MODEL_DIR --input groups.jsonl --output logprobs.jsonl

Writes a line for each group: "id", "log_probs" (of each response, the sum over its tokens) and "tokens". What is
finished is kept in OUTPUT.parts: a run that was killed goes on there when it is started again.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.generation import prompt_batches
from mpo_megatron.rollout.log_probs import start_log_probs
from mpo_megatron.rollout.parts import begin, digest_of, digest_of_folder
from mpo_megatron.rollout.records import read_groups
from mpo_megatron.rollout.work import work_off


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        compute(args)
    except (UserError, OSError) as error:
        sys.exit(f"logprobs.py: {error}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The log-probability that a chat model gives to each response of sampled groups."
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder (chat template needed)")
    add("--input", type=Path, required=True, help="JSONL that tools/generate.py or tools/score.py wrote")
    add("--output", type=Path, required=True, help='JSONL to write: "id", "log_probs", "tokens"')
    add(
        "--batch-size",
        type=int,
        default=64,
        help="responses whose prompts are read together (default %(default)s)",
    )
    add("--processes", type=int, default=1, help="processes that share the groups (default %(default)s)")
    add(
        "--dtype",
        choices=("bfloat16", "float32", "float64"),
        default="float32",
        help="of the model (default %(default)s)",
    )
    add("--limit", type=int, default=None, help="first so many groups only")
    add("--device", default=None, help="torch device; left out: cuda where there is one, otherwise cpu")
    return parser.parse_args(argv)


def compute(args: argparse.Namespace) -> None:
    if not (args.model / "config.json").is_file():
        raise UserError(f"--model {args.model} has no config.json; give a Hugging Face model's folder")
    if args.processes < 1 or args.batch_size < 1:
        raise UserError(f"--processes {args.processes} and --batch-size {args.batch_size} must be at least 1")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} leaves no group; give at least 1")
    groups = read_groups(args.input, constraints=False)[: args.limit]
    settings = {"the model in --model": digest_of_folder(args.model), "--dtype": args.dtype}
    start = partial(start_log_probs, str(args.model), args.dtype, args.device, args.processes)
    with begin(args.output, settings, {group["id"]: digest_of(group) for group in groups}) as parts:
        finished = parts.finished()
        waiting = [group for group in groups if group["id"] not in finished]
        longest = max(len(group["responses"]) for group in groups)
        batches = prompt_batches(waiting, longest, max(args.batch_size, longest))
        work_off(parts, batches, start, processes=args.processes, total=len(groups), unit="group")
        parts.merge(args.output, groups, lambda group, found: {"id": group["id"], **found})
    print(f"{args.output}: log-probs of {len(groups)} groups")


if __name__ == "__main__":
    main()
