"""The first hour on a GPU: parity, memory, speed, and one table of all to send back. bash tools/gpu_suite.sh runs it.

    python tools/gpu_suite.py [OUTPUT] [--only NAME ...] [--tests EXPRESSION] [--quick]

Runs tests/gpu and the benchmarks of tools/benchmark.py, prints the table, and writes it with the machine, its libraries
and the benchmarks' own tables to OUTPUT (Markdown). Without a GPU it says of each part why it was left out, and fills
the rows that a CPU can, in small. Exit status: 1 if anything failed.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mpo_megatron.runtime.probe import probe  # noqa: E402
from mpo_megatron.runtime.quiet import quiet_third_parties  # noqa: E402
from tools.doctor import described  # noqa: E402
from tools.gpu_table import (  # noqa: E402
    FAILED,
    PARITY,
    PASSED,
    SKIPPED,
    Row,
    details,
    markdown,
    parity_rows,
    read_cases,
    show,
)

NO_GPU = "torch finds no GPU on this machine"
# pyproject.toml's settings for developers: a container's pytest may be older, and lack the plugins that they configure.
PYTEST = ("-q", "-o", "addopts=--import-mode=importlib", "-o", "minversion=7.0", "-o", "junit_family=xunit1")


@dataclass(frozen=True)
class Benchmark:
    """A run of tools/benchmark.py.

    Attributes:
        on_cpu: its arguments where there is no GPU, small enough for some ten seconds; None: it needs one.
        headline: what the table says of its figures.
    """

    name: str
    headline: Callable[[Mapping[str, Any]], str]
    on_cpu: tuple[str, ...] | None = ()
    on_gpu: tuple[str, ...] = ()


def _mfu(found: Mapping[str, Any]) -> str:
    told = [f"{found['tflops']:.3g} TFLOP/s, of 32 layers by the difference"]
    if "mfu" in found:
        told.insert(0, f"MFU {found['mfu']:.1%} ({found['mfu_passes']:.1%} without the optimizer)")
    if "layers" in found:
        layers = int(found["layers"])
        told.append(f"peak {found[f'peak_bytes_{layers}_layers'] / 2**30:.1f} GiB at {layers} layers")
    return ", ".join(told)


def _head(found: Mapping[str, Any]) -> str:
    kept, eager_kept, peak, eager_peak = (
        found[f"{name}_bytes"] / 2**20 for name in ("kept", "eager_kept", "peak", "eager_peak")
    )
    beside = ""
    if "eager_head_seconds" in found:
        seconds, other_peak = found["eager_head_seconds"], found["eager_head_peak_bytes"] / 2**20
        beside = f"; the eager head {seconds * 1e3:.1f} ms, peak {other_peak:.0f} MiB"
    return (
        f"kept {kept:.0f} MiB, whole logits {eager_kept:.0f}; peak {peak:.0f} MiB, whole logits {eager_peak:.0f}; "
        f"{found['seconds'] * 1e3:.1f} ms, {found['time_ratio']:.2f} x whole logits{beside}"
    )


def _attention(found: Mapping[str, Any]) -> str:
    names = [key.removesuffix("_tflops") for key in found if key.endswith("_tflops")]
    return ", ".join(f"{name} {found[f'{name}_seconds'] * 1e3:.2f} ms" for name in names)


BENCHMARKS = {
    "mfu": Benchmark("mfu", _mfu),
    "mfu-fp8": Benchmark("mfu", _mfu, None, ("--fp8", "tensorwise")),
    "shared-prompt": Benchmark(
        "shared-prompt",
        lambda found: f"{found['gain']:.2f} x as fast, {found['flop_ratio']:.2f} x fewer FLOPs",
        ("--hidden", "256", "--layers", "2"),
    ),
    "head": Benchmark("head", _head),
    "attention": Benchmark("attention", _attention),
    "two-pass": Benchmark(
        "two-pass",
        lambda found: f"{found['overhead']:.2f} x for groups cut over rows, 1.00 x for others",
        ("--hidden", "256", "--layers", "1"),
    ),
}
PARTS = [PARITY, *BENCHMARKS]
_SECONDS = 1200  # of a benchmark


def main(arguments: list[str] | None = None) -> int:
    """Run everything, print the table and write it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/gpu_suite.sh", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("gpu-results.md"))
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument(
        "--tests", metavar="EXPRESSION", help="of tests/gpu, those of this -k expression of pytest"
    )
    parser.add_argument("--quick", action="store_true", help="few repeats, as on a CPU")
    given = parser.parse_args(arguments)
    quiet_third_parties()
    import torch

    gpus, started = torch.cuda.device_count(), time.monotonic()
    rows: list[Row] = []
    below = ""

    def write() -> None:
        minutes, facts = (time.monotonic() - started) / 60, described(probe())
        page = markdown(rows, heading(facts, minutes), facts, [below, "## Benchmarks", tables.read_text()])
        given.output.write_text(page, encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables.md"
        tables.touch()
        # After each part: an hour may end before the suite does.
        for name in (name for name in PARTS if name in (given.only or PARTS)):
            if name == PARITY:
                rows, below = parity(Path(folder) / "junit.xml", given.tests)
            else:
                rows += benchmark(name, gpus > 0, given.quick, tables)
            write()
    show(rows)
    failed = sum(row.result.startswith(FAILED) for row in rows)
    print(f"{f'{failed} rows failed; ' if failed else ''}the table is in {given.output}")
    return int(failed > 0)


def parity(report: Path, expression: str | None) -> tuple[list[Row], str]:
    """Run tests/gpu, by a pytest of its own: the rows, and what stands below them."""
    print("== tests/gpu", flush=True)
    more = ["-k", expression] if expression else []
    command = [sys.executable, "-m", "pytest", *PYTEST, f"--junitxml={report}", "tests/gpu", *more]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    cases = read_cases(report.read_text(encoding="utf-8")) if report.is_file() else []
    rows = parity_rows(cases)
    # 1: a test failed, of which there is a row.
    if status not in (0, 1) or not rows:
        rows.append(
            Row(PARITY, "tests/gpu", "", FAILED, note=f"pytest ended with status {status}, see above")
        )
    return rows, details(cases)


def benchmark(name: str, on_gpu: bool, quick: bool, tables: Path) -> list[Row]:
    """Run a benchmark, whose table goes to `tables`. Without a GPU a row says so, and another what the CPU found."""
    wanted = BENCHMARKS[name]
    rows = [] if on_gpu else [Row(name, wanted.name, "GPU", SKIPPED, note=NO_GPU)]
    arguments = wanted.on_gpu if on_gpu else wanted.on_cpu
    if arguments is None:
        return rows
    print(f"== {name}", flush=True)
    small = ["--quick", "--repeats", "2"] if quick or not on_gpu else []
    command = [
        sys.executable,
        "tools/benchmark.py",
        wanted.name,
        *small,
        *arguments,
        "--markdown",
        str(tables),
    ]
    on = "GPU" if on_gpu else "CPU"
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=False, text=True, capture_output=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [*rows, Row(name, wanted.name, on, FAILED, note=f"no end within {_SECONDS} s")]
    print(done.stdout, end="", flush=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr, flush=True)
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]
        # What not every GPU has says so in a sentence.
        lacking = wanted.on_cpu is None and reason.startswith("error: ")
        return [*rows, Row(name, wanted.name, on, SKIPPED if lacking else FAILED, note=reason)]
    found = json.loads(done.stdout.splitlines()[-1])
    note = "" if on_gpu else "small shapes, processor time"
    return [*rows, Row(name, _setting(found["settings"]), on, PASSED, wanted.headline(found), note)]


def _setting(settings: Mapping[str, Any]) -> str:
    """What a benchmark's figures are of, in short."""
    known = (
        "layers of",
        "attention",
        "head",
        "precision",
        "fp8",
        "prompt",
        "response",
        "responses",
        "groups",
    )
    return ", ".join(f"{key} {settings[key]}" for key in known if settings.get(key) not in (None, "None"))


def heading(facts: Iterable[str], minutes: float) -> str:
    """A sentence of date, commit, and what of the machine everything depends on."""
    lines = dict(line.split("  ", 1) for line in facts if "  " in line)
    named = [
        f"{name} {lines[name].strip()}"
        for name in ("GPU 0", "GPUs", "CPU", "driver", "NCCL")
        if name in lines
    ]
    libraries = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex")
    known = [*named, *(lines[name].strip() for name in libraries if name in lines)]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=False, capture_output=True, text=True
    ).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{today}, commit {commit or 'not known'}, {minutes:.0f} minutes. {'; '.join(known)}."


if __name__ == "__main__":
    sys.exit(main())
