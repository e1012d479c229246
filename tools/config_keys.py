"""Print every key of the main job's configuration: its type, its default and what it is.

    python tools/config_keys.py

It is read from the source of the schema, mpo_megatron/config/schema.py: the comment beside a key, or above it, is its
description. docs/configuration.md shows the same.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SCHEMA = Path(__file__).resolve().parents[1] / "mpo_megatron" / "config" / "schema.py"
# Keys that stand beside others in a YAML and have a table of their own: tools/objectives.py prints it.
HYPER_PARAMETERS = "hyper_parameters"


@dataclass(frozen=True)
class Key:
    """One key with its path, as it is written in a YAML: `default` is empty where a value must be given."""

    path: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass. `path` is empty for the top level."""

    path: str
    description: str
    keys: tuple[Key, ...]


def main() -> None:
    sys.stdout.write(markdown(sections(SCHEMA.read_text(encoding="utf-8"))))


def sections(source: str) -> list[Section]:
    """All sections of the schema, the top level first, each before those within it."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return list(_sections("Config", "", classes, source.splitlines()))


def _sections(
    name: str, path: str, classes: Mapping[str, ast.ClassDef], lines: list[str]
) -> Iterator[Section]:
    keys, below = [], []
    for node in classes[name].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        key = f"{path}.{node.target.id}".lstrip(".")
        kind = ast.unparse(node.annotation)
        if kind in classes:
            below.append((kind, key))
        elif node.target.id != HYPER_PARAMETERS:
            keys.append(Key(key, kind, _default(node.value), _comment(node, lines)))
    docstring = ast.get_docstring(classes[name]) or ""
    yield Section(path, docstring.replace("\n", " "), tuple(keys))
    for kind, key in below:
        yield from _sections(kind, key, classes, lines)


def _default(value: ast.expr | None) -> str:
    """As YAML has it."""
    assert value is not None, "every key of the schema has a default, or MISSING"
    text = ast.unparse(value)
    if text == "MISSING":
        return ""
    if text.startswith("field("):
        return "{}"
    if not isinstance(value, ast.Constant):
        return text.replace("(", "[").replace(",)", ")").replace(")", "]")
    if isinstance(value.value, str):
        return value.value or '""'
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _comment(node: ast.AnnAssign, lines: list[str]) -> str:
    """The comment lines above the key, then that beside it, which may be within parentheses of its value."""
    assert node.end_lineno is not None
    found: list[str] = []
    above = node.lineno - 2
    while lines[above].strip().startswith("#"):
        found.insert(0, lines[above].strip())
        above -= 1
    for number in range(node.lineno - 1, node.end_lineno):
        _, mark, text = lines[number].partition("  # ")
        if mark:
            found.append(text)
    return " ".join(text.lstrip("# ") for text in found)


def markdown(found: list[Section]) -> str:
    """A heading and a table for every section."""
    parts = []
    for section in found:
        parts.append(
            f"## {f'`{section.path}`' if section.path else 'Top level'}\n\n{_escaped(section.description)}\n"
        )
        if section.keys:
            rows = [f"| `{key.path}` | {_code(key.type)} | {_code(key.default)} | {_escaped(key.description)} |"
                    for key in section.keys]  # fmt: skip
            parts.append(
                "\n".join(["| key | type | default | what it is |", "| --- | --- | --- | --- |", *rows, ""])
            )
    return "\n".join(parts)


def _code(text: str) -> str:
    return f"`{text.replace('|', '&#124;')}`" if text and "|" not in text else text.replace("|", "or")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
