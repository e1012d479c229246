"""What tools/gpu_suite.py found, as a table: rows, what pytest's report of tests/gpu says, and the page."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PASSED, SKIPPED, FAILED = "passed", "skipped", "FAILED"
PARITY = "parity"
_SHOWN = 3000
_RAISED = re.compile(r"[\w.]+(Error|Exception|Interrupt)\b")
COLUMNS = ("part", "what", "on", "result", "measured", "note")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        on: GPU or CPU.
        result: PASSED, SKIPPED or FAILED, with a number of cases where there are several.
        measured: deviations, each beside what is allowed; times and bytes.
        note: why it was skipped, or how it failed.
    """

    part: str
    what: str
    on: str
    result: str
    measured: str = ""
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return self.part, self.what, self.on, self.result, self.measured, self.note


@dataclass(frozen=True)
class Case:
    """A test with its parameters.

    Attributes:
        measured: what, value, and at_most or None.
        text: of a failure.
    """

    what: str
    parameters: str
    on: str
    result: str
    note: str
    measured: tuple[Mapping[str, Any], ...]
    text: str

    @property
    def part(self) -> str:
        return "memory" if self.what.startswith("checkpoint:") else PARITY


def read_cases(junit: str) -> list[Case]:
    """Of pytest's report."""
    cases = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        test, _, parameters = (case.get("name") or "").partition("[")
        module = (case.get("classname") or "").rpartition(".")[2]
        what = f"{module.removeprefix('test_')}: {test.removeprefix('test_')}".replace("_", " ")
        on = "".join(_properties(case, "on")).upper()
        measured = tuple(json.loads(value) for value in _properties(case, "measured"))
        cases.append(Case(what, parameters.removesuffix("]"), on, *_outcome(case), measured, _text(case)))
    return sorted(cases, key=lambda case: (case.what, case.on))


def parity_rows(cases: Iterable[Case]) -> list[Row]:
    """A row for all cases of a test that ended alike; one for each case that failed."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        parameters = case.parameters if case.result == FAILED else ""
        groups.setdefault((case.what, case.on, case.result, case.note, parameters), []).append(case)
    return [
        Row(
            same[0].part,
            f"{what} [{parameters}]" if parameters else what,
            on,
            result if result == FAILED else f"{len(same)} {result}",
            worst(same),
            note,
        )
        for (what, on, result, note, parameters), same in groups.items()
    ]


def details(cases: Iterable[Case]) -> str:
    """Markdown: what each case on a GPU measured, and the ends of the failures' texts."""
    on_gpu = [case for case in cases if case.on == "GPU" and case.measured]
    lines = ["## Every case on a GPU", "", "| test | case | result | measured |", "| --- | --- | --- | --- |"]
    lines += [f"| {c.what} | {c.parameters} | {c.result} | {worst([c])} |" for c in on_gpu]
    parts = ["\n".join(lines)] if on_gpu else []
    failed = [case for case in cases if case.result == FAILED]
    parts += ["## Failures"] if failed else []
    parts += [f"### {c.what} [{c.parameters}]\n\n```\n{c.text[-_SHOWN:]}\n```" for c in failed]
    return "\n\n".join(parts)


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind, result in (("failure", FAILED), ("error", FAILED), ("skipped", SKIPPED)):
        found = case.find(kind)
        if found is not None:
            lines = (found.get("message") or found.text or "").strip().splitlines() or [kind]
            # What a rank raised comes last in the message of the ranks.
            raised = [line.strip() for line in lines[1:] if _RAISED.match(line.strip())]
            return result, " ... ".join([lines[0], *raised[-1:]])[:300]
    return PASSED, ""


def _text(case: ElementTree.Element) -> str:
    found = [case.find(kind) for kind in ("failure", "error")]
    return "\n".join(one.text or "" for one in found if one is not None).strip()


def _properties(case: ElementTree.Element, name: str) -> list[str]:
    return [one.get("value") or "" for one in case.iter("property") if one.get("name") == name]


def worst(cases: Iterable[Case]) -> str:
    """Of each thing that the cases measured, the value nearest to its limit, or where it has none the largest."""
    found: dict[str, Mapping[str, Any]] = {}
    for case in cases:
        for one in case.measured:
            if one["what"] not in found or _share(one) > _share(found[one["what"]]):
                found[one["what"]] = one
    return "; ".join(
        f"{what} {value['value']:.2g}" + ("" if value["at_most"] is None else f" (<= {value['at_most']:.2g})")
        for what, value in found.items()
    )


def _share(measured: Mapping[str, Any]) -> float:
    value, limit = float(measured["value"]), measured["at_most"]
    if value != value:
        return float("inf")
    return value / limit if limit else value


def markdown(rows: Iterable[Row], head: str, facts: Iterable[str], sections: Iterable[str]) -> str:
    """The whole page."""
    lines = ["# What the GPU suite found", "", head, "", f"| {' | '.join(COLUMNS)} |"]
    lines.append("| --- " * len(COLUMNS) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in rows]
    lines += ["", "Measured: of all cases of a row the value nearest to what is allowed (<=).", ""]
    lines += ["## The machine", "", "```", *facts, "```", ""]
    return "\n".join(lines) + "\n" + "\n\n".join(section.strip() for section in sections if section) + "\n"


def show(rows: Iterable[Row]) -> None:
    """Print the table."""
    table = Table(*COLUMNS, title="GPU suite", show_lines=True)
    for row in rows:
        table.add_row(*map(escape, row.cells))
    Console(width=max(160, Console().width)).print(table)
