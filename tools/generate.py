"""Samples several responses to each prompt of a JSONL file with a chat model, in transformers or vLLM.

    python tools/generate.py --model MODEL_DIR --prompts examples/data/prompts.jsonl --split train --output groups.jsonl

What is finished is kept in OUTPUT.parts: a run that was killed goes on there when it is started again. Score the result
with tools/score.py.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.generation import (
    Sampling,
    prompt_batches,
    start_sampler,
    start_vllm,
    temperature_of,
)
from mpo_megatron.rollout.options import add_placement, check_at_least_one
from mpo_megatron.rollout.parts import begin, digest_of, digest_of_folder
from mpo_megatron.rollout.records import Record, read_prompts
from mpo_megatron.rollout.work import work_off

KEPT_FIELDS = ("id", "split", "prompt", "temperature", "constraints", "topic_words")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        generate(args)
    except (UserError, OSError) as error:
        sys.exit(f"generate.py: {error}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample several responses to each prompt with a chat model.")
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        help="Hugging Face folder of an instruct model (chat template needed)",
    )
    add(
        "--prompts",
        type=Path,
        required=True,
        help='JSONL with "id" and "prompt" [, "temperature", "constraints", "topic_words", "split"]',
    )
    add("--output", type=Path, required=True, help='JSONL to write: the prompts with "responses"')
    add("--samples", type=int, default=4, help="responses per prompt (default %(default)s)")
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="1.0 samples from the model's own distribution, 0 takes the likeliest token (default %(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="keep the likeliest tokens that hold this share of probability (default %(default)s)",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=80,
        help="longest response; what is cut there scores lower (default %(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=None,
        help="sequences (prompts x samples) that are sampled together (default 128, with vllm 8192)",
    )
    add("--seed", type=int, default=0, help="same seed and settings, same responses (default %(default)s)")
    add_placement(add, "prompts")
    add(
        "--backend",
        choices=("hf", "vllm"),
        default="hf",
        help="what samples: the model in transformers, or vLLM, on GPUs, whatever --device (default %(default)s)",
    )
    add(
        "--gpus-per-process",
        type=int,
        default=1,
        help="GPUs that each process of vllm puts the model on (default %(default)s)",
    )
    add(
        "--split",
        choices=("train", "validation", "all"),
        default="all",
        help='prompts with this "split" only (default %(default)s)',
    )
    add("--limit", type=int, default=None, help="first so many prompts only")
    return parser.parse_args(argv)


def generate(args: argparse.Namespace) -> None:
    if not args.model.is_dir():
        raise UserError(f"--model {args.model} is not a folder; give a Hugging Face model's folder")
    check_at_least_one(args, "--processes", "--gpus-per-process", "--limit")
    if args.batch_size is None:
        args.batch_size = max(args.samples, 8192 if args.backend == "vllm" else 128)
    prompts = select(read_prompts(args.prompts), args)
    sampling = Sampling(args.samples, args.temperature, args.top_p, args.max_new_tokens, args.seed)
    # Before the model is read.
    prompt_batches([], args.samples, args.batch_size)
    for record in prompts:
        temperature_of(record, sampling)
    if args.backend == "vllm":
        start = partial(start_vllm, str(args.model), sampling, args.dtype, args.gpus_per_process)
    else:
        start = partial(start_sampler, str(args.model), sampling, args.dtype, args.device, args.processes)
    inputs = {record["id"]: digest_of(kept_fields(record)) for record in prompts}
    with begin(args.output, settings_of(args), inputs) as parts:
        finished = parts.finished()
        if finished:
            print(f"{parts.folder}: {len(finished)} of {len(prompts)} groups are there already")
        waiting = [record for record in prompts if record["id"] not in finished]
        batches = prompt_batches(waiting, args.samples, args.batch_size)
        work_off(parts, batches, start, processes=args.processes, total=len(prompts), unit="prompt")
        parts.merge(
            args.output, prompts, lambda record, sampled: kept_fields(record) | {"responses": sampled}
        )
    print(f"{args.output}: {len(prompts)} groups of {args.samples} responses")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the responses depend on."""
    return {
        "the model in --model": digest_of_folder(args.model),
        "--samples": args.samples,
        "--temperature": args.temperature,
        "--top-p": args.top_p,
        "--max-new-tokens": args.max_new_tokens,
        "--seed": args.seed,
        "--dtype": args.dtype,
        "--backend": args.backend,
    }


def kept_fields(record: Record) -> Record:
    return {name: record[name] for name in KEPT_FIELDS if name in record}


def select(records: list[Record], args: argparse.Namespace) -> list[Record]:
    chosen = [record for record in records if args.split in ("all", record.get("split"))]
    if not chosen:
        raise UserError(f'{args.prompts} has no prompt with "split": "{args.split}"; use --split all')
    return chosen[: args.limit]


if __name__ == "__main__":
    main()
