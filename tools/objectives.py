"""Print the table of objectives: what each contrasts, what it needs, its hyper-parameters and its source.

    python tools/objectives.py [--markdown]

It comes from the objectives' own signatures and entries. Hyper-parameters without a value have to be given, as
model.mpo.beta=... or in the YAML; the last column has what the authors used.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mpo_megatron.objectives import Entry, get, names
from mpo_megatron.objectives.hyper import HyperParameter

COLUMNS = ("objective", "contrasts", "reference", "hyper-parameters", "source", "authors used")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the table of objectives.")
    parser.add_argument("--markdown", action="store_true", help="as the README has it")
    if parser.parse_args(argv).markdown:
        print(markdown())
        return
    table = Table(show_lines=True)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for name in names():
        table.add_row(*row(get(name)))
    # At least as wide as is readable, also where the output is no terminal.
    console = Console(file=sys.stdout)
    Console(file=sys.stdout, width=max(console.width, 120)).print(table)


def row(entry: Entry) -> tuple[str, ...]:
    """The cells of one objective."""
    settings = ", ".join(shown(parameter) for parameter in entry.hyper_parameters.values())
    reference = "yes" if entry.needs_reference else "no"
    return entry.name, entry.contrasts, reference, settings or "none", entry.source, entry.settings


def shown(parameter: HyperParameter) -> str:
    """A hyper-parameter with its default and, of words, the other choices."""
    if parameter.required:
        return parameter.name
    default = parameter.default
    if parameter.choices:
        others = [choice for choice in parameter.choices if choice != default]
        return f"{parameter.name}={default} (or {', '.join(others)})"
    return f"{parameter.name}={str(default).lower() if isinstance(default, bool) else f'{default:g}'}"


def markdown() -> str:
    """The table for documents."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for name in names():
        first, *rest = row(get(name))
        lines.append((f"`{first}`", *rest))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
