"""Measure what this project claims: one sub-command a claim.

    python tools/benchmark.py shared-prompt|trl|unshared|two-pass|plan|head|step|attention|mfu|convert|checkpoint|
                              generate
                              [--quick] [--repeats N] [--threads N] ...
    python tools/benchmark.py all --output FILE [--quick] ...

Each prints a table and, last, one line of JSON. Time is processor time of the process, or where there is a GPU the time
in which it works (--accelerator), medians over repeats, with both sides in one run. `all` runs one after the other and
writes the tables to a Markdown file, into the place that it keeps for them if it has one, and a picture beside it.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from mpo_megatron.benchmarks.picture import draw
from mpo_megatron.benchmarks.report import Report, machine, show, to_json, to_markdown
from mpo_megatron.errors import UserError
from mpo_megatron.runtime.quiet import quiet_third_parties

BENCHMARKS = {
    "shared-prompt": "prompts stored once against prompts repeated",
    "trl": "groups per second against TRL's DPOTrainer",
    "unshared": "groups per second against rows of the same planner with a prompt for each response",
    "two-pass": "groups cut over rows against rows that hold whole groups",
    "plan": "fill, balance and speed of the planner",
    "head": "memory and time of the response head against whole logits",
    "step": "where the time of a training step goes, and how it grows",
    "attention": "the attention backends beside each other",
    "mfu": "model FLOPs utilisation of training steps on layers of Llama 3 8B",
    "convert": "memory of checkpoint conversion against its bound",
    "checkpoint": "memory of writing and reading a run's checkpoints, by form",
    "generate": "tokens per second of samples in a batch against one sequence at a time",
}
# What else belongs to a benchmark that is not to be quick.
_WHOLE = {"shared-prompt": ["--ranks"]}
MARKER = "<!-- benchmarks -->"


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    quiet_third_parties()  # the benchmarks' own imports follow
    command = argparse.ArgumentParser(prog="tools/benchmark.py", description=__doc__.splitlines()[0])
    choices = command.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="small, within a minute on two cores")
    common.add_argument("--repeats", type=int, default=5, help="timed repeats or steps (5)")
    common.add_argument("--threads", type=int, help="torch threads (2 for trl, 1 for the others)")
    common.add_argument("--markdown", type=Path, help="also append the table to this file")
    common.add_argument("--json", type=Path, help="also append the line of JSON to this file")
    chosen = (sys.argv[1:] if arguments is None else arguments)[:1]
    for name, text in BENCHMARKS.items():
        parser = choices.add_parser(name, help=text, parents=[common])
        if chosen == [name]:  # the others' imports cost seconds, or are not there
            _module(name).add_arguments(parser)
    everything = choices.add_parser("all", help="all of them, into a Markdown file", parents=[common])
    everything.add_argument("--output", type=Path, required=True)
    everything.add_argument("--model", help="Hugging Face folder for trl, step and generate")
    parsed = command.parse_args(arguments)
    if parsed.repeats < 1:
        command.error(f"--repeats {parsed.repeats} must be 1 or more")
    for name in ("markdown", "json", "output"):
        path = getattr(parsed, name, None)
        # Before what is to be written has taken its time.
        if path is not None and not path.absolute().parent.is_dir():
            command.error(f"--{name} {path}: there is no folder {path.parent}; make it")
    if parsed.benchmark == "all":
        return _run_all(parsed)
    if parsed.threads is None:
        parsed.threads = 2 if parsed.benchmark == "trl" else 1
    try:
        report: Report = _module(parsed.benchmark).run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, text in ((parsed.markdown, to_markdown(report)), (parsed.json, to_json(report))):
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    show(report)
    return 0


def _module(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"mpo_megatron.benchmarks.{name.replace('-', '_')}")


def _run_all(parsed: argparse.Namespace) -> int:
    """Each benchmark in a process of its own; one that fails does not lose the others."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        tables, lines = Path(folder) / "tables.md", Path(folder) / "lines.jsonl"
        lines.touch()
        facts = ", ".join(f"{name} {value}" for name, value in machine().items())
        tables.write_text(f"Made by `tools/benchmark.py all`: {facts}.\n\n", encoding="utf-8")
        for name in BENCHMARKS:
            more = ["--quick"] if parsed.quick else _WHOLE.get(name, [])
            more += ["--threads", str(parsed.threads)] if parsed.threads else []
            more += ["--model", parsed.model] if parsed.model and name in ("trl", "step", "generate") else []
            command = [sys.executable, __file__, name, "--repeats", str(parsed.repeats), *more]
            print(f"== {name}", flush=True)
            kept = ["--markdown", str(tables), "--json", str(lines)]
            if subprocess.run([*command, *kept], check=False).returncode:
                failed.append(name)
        _write(parsed.output, tables.read_text(encoding="utf-8"))
        found = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
        draw({one["benchmark"]: one for one in found}, parsed.output.with_suffix(".png"))
    if failed:
        print(f"error: {', '.join(failed)} failed; the others are in {parsed.output}", file=sys.stderr)
    return 1 if failed else 0


def _write(path: Path, tables: str) -> None:
    """Write the file, or, where it has a line MARKER twice, what lies between the two."""
    before, mark, rest = (
        path.read_text(encoding="utf-8").partition(MARKER) if path.is_file() else ("", "", "")
    )
    after = rest.partition(MARKER)[2]
    text = f"{before}{mark}\n\n{tables}{mark}{after}" if mark and MARKER in rest else tables
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
