"""On-policy rounds: sample, score, train, export, and again from the model that came of it; a report after each round.

    python tools/run_rounds.py conf/rounds/smollm2.yaml --output DIR [key=value ...]
    python tools/run_rounds.py ... --slurm [--submit]        # a chain of Slurm jobs instead, one for each stage

Every key of the file is in mpo_megatron/rounds/config.py; key=value changes one. Each stage has a folder in DIR. Run
again, after an end of any kind, the command goes on with the first stage that is not done.
"""

import argparse
import runpy
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from mpo_megatron.errors import UserError
from mpo_megatron.rounds import figures, report, slurm, state
from mpo_megatron.rounds.config import RoundsConfig, read_config
from mpo_megatron.rounds.execute import execute
from mpo_megatron.rounds.figures import Line
from mpo_megatron.rounds.prompts import split_prompts, write_prompts
from mpo_megatron.rounds.stages import JOB, Command, Round, Stage, plan_rounds, prompts_file
from mpo_megatron.runtime.commands import interrupt_on_signals

# Held-out prompts in samples.md.
EXAMPLES = 9


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the rounds, such as conf/rounds/smollm2.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder of all stages and of the report")
    parser.add_argument("--stage", help="this one alone, such as round-1/train")
    parser.add_argument(
        "--slurm", action="store_true", help="write a batch script for each stage, start nothing"
    )
    parser.add_argument("--submit", action="store_true", help="write the scripts and submit them, as a chain")
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="of trainings: torchrun on this machine, or examples/slurm.sh on the nodes of this Slurm job",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the file's keys")
    args = parser.parse_intermixed_args(argv)
    try:
        config = read_config(args.file, args.overrides)
        rounds = prepare(config, args.output)
        if args.slurm or args.submit:
            write_jobs(config, rounds, args)
            return 0
        lines = run(config, rounds, args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    if lines:
        report.show(lines, config_title(config))
        names = ("rounds.csv", "rounds.md", "rounds.png", "samples.md")
        print(f"report      {', '.join(str(args.output / name) for name in names)}")
    return 0


def config_title(config: RoundsConfig) -> str:
    return f"{config.rounds} rounds from {Path(config.model).name}"


def prepare(config: RoundsConfig, output: Path) -> list[Round]:
    """The rounds, with what can be wrong in them found, and their prompts written."""
    held_out, prompts = split_prompts(config.prompts, config.rounds, config.seed)
    rounds = plan_rounds(config, output, held_out, prompts)
    slurm.check_options(config.slurm)
    for stage in stages_of(rounds):
        for command in stage.commands:
            check_arguments(command, stage)
        if all((record := state.read(need)) and record.made for need in stage.needs):
            state.is_done(stage)
    for number, records in enumerate([held_out, *prompts]):
        write_prompts(prompts_file(output, number), records)
    return rounds


def stages_of(rounds: Sequence[Round]) -> list[Stage]:
    return [stage for one in rounds for stage in one.stages.values()]


def check_arguments(command: Command, stage: Stage) -> None:
    """Have a tool read its command line before anything is started."""
    if command.program == JOB:
        return
    said = StringIO()
    try:
        with redirect_stderr(said):
            runpy.run_path(str(command.program))["parse_arguments"](list(command.arguments))
    except SystemExit:
        what = said.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"{stage}: {command.program.name} does not take these options: {what}") from None


def write_jobs(config: RoundsConfig, rounds: Sequence[Round], args: argparse.Namespace) -> None:
    """Write the Slurm jobs of what is left to do, and submit them if asked to."""
    command = [__file__, str(args.file.absolute()), "--output", str(args.output.absolute()), *args.overrides]
    left = slurm.write_chain(stages_of(rounds), config.slurm, args.output, command)
    folder = args.output / "slurm"
    if not left:
        print("every stage is done; there is nothing to submit")
        return
    print(f"{len(left)} batch scripts in {folder}, each after the stages that it reads:")
    for stage in left:
        after = ", ".join(need.name for need in stage.needs if need in left)
        print(f"  {stage}" + (f" after {after}" if after else ""))
    if args.submit:
        print(slurm.submit(args.output), end="")
    else:
        print(f"to submit them: bash {folder / slurm.SUBMIT}")


def run(config: RoundsConfig, rounds: Sequence[Round], args: argparse.Namespace) -> list[Line]:
    """Bring the stages to their end, one after the other, with a report after each round. Returns its lines."""
    stages, only, output = stages_of(rounds), args.stage, args.output
    if only is not None:
        stages = [stage for stage in stages if stage.name == only]
        if not stages:
            names = ", ".join(stage.name for stage in stages_of(rounds))
            raise UserError(f"--stage {only} is none of {names}")
    last_of_round = [list(one.stages.values())[-1] for one in rounds]
    for number, stage in enumerate(stages, 1):
        label = f"[{number}/{len(stages)}] {stage}"
        began = time.perf_counter()

        def say(what: str, label: str = label) -> None:
            print(f"{label}: {what}", flush=True)

        if execute(stage, keep_checkpoints=config.keep_checkpoints, say=say, launcher=args.launcher):
            say(f"done in {time.perf_counter() - began:.0f} s")
            if stage in last_of_round:
                write_report(config, rounds, output)
        else:
            say("kept")
    return write_report(config, rounds, output)


def write_report(config: RoundsConfig, rounds: Sequence[Round], output: Path) -> list[Line]:
    """Write what the rounds that are done have come to, if any is. Returns its lines."""
    from mpo_megatron.rollout.log_probs import response_ids
    from mpo_megatron.rollout.sampling import chat_tokenizer

    tokenizer = chat_tokenizer(config.model)
    lines = figures.lines(rounds, lambda response: len(response_ids(tokenizer, response)))
    if lines:
        title = config_title(config)
        report.write_csv(lines, output / "rounds.csv")
        report.write_markdown(lines, title, output / "rounds.md")
        report.plot(lines, title, output / "rounds.png")
        report.write_samples(figures.examples(rounds[: len(lines)], EXAMPLES), title, output / "samples.md")
    return lines


if __name__ == "__main__":
    interrupt_on_signals()
    sys.exit(main())
