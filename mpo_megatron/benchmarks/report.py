"""What a benchmark found, for people (a table) and for programs (one line of JSON, the last)."""

import datetime
import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PACKAGES = ("torch", "megatron-core", "transformers", "trl")


@dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
        benchmark: the sub-command's name.
        columns: titles of the table.
        rows: its cells.
        figures: the named numbers of the JSON line.
        settings: what they were measured with.
        notes: sentences for below the table.
    """

    benchmark: str
    columns: list[str]
    rows: list[list[str]]
    figures: dict[str, float]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def show(report: Report) -> None:
    """Print the table, the notes and, last, the line of JSON."""
    table = Table(title=report.benchmark)
    for number, column in enumerate(report.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in report.rows:
        table.add_row(*row)
    console = Console(width=max(100, Console().width), soft_wrap=True)
    console.print(table)
    for note in report.notes:
        console.print(note, highlight=False)
    print(to_json(report), flush=True)


def to_json(report: Report) -> str:
    """One line: the benchmark's name, its figures, and the settings with date, versions and machine."""
    rounded = {name: float(f"{value:.6g}") for name, value in report.figures.items()}
    return json.dumps({"benchmark": report.benchmark, **rounded, "settings": report.settings | machine()})


def to_markdown(report: Report) -> str:
    """The table and notes as a Markdown section."""
    lines = [f"### {report.benchmark}", "", "| " + " | ".join(report.columns) + " |"]
    lines += ["| --- " + "| ---: " * (len(report.columns) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in report.rows]
    lines += ["", *[f"{note}  " for note in report.notes]]
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    return "\n".join([*lines, "", f"Settings: {settings}.", ""])


def machine() -> dict[str, Any]:
    """Date, versions and class of machine."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **versions,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": " ".join(_instructions()),
    }


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Those of the processor that matter to products."""
    has = _cpu_info("flags").split()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in has]


def _cpu_info(name: str) -> str:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
