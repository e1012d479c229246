"""The pages of docs/: their fenced blocks, and what their tables have in code."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(
    r"^(?P<indent> *)```(?: \{ \.)?(?P<language>\w*)(?: \})?\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language (empty where there is none), its text, and the paragraph before it."""

    language: str
    text: str
    before: str


def pages() -> list[Path]:
    """All pages, by name."""
    return sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page, in order; of one language, if it is given."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(
            match["language"],
            textwrap.dedent(match["text"]),
            text[: match.start()].rstrip().split("\n\n")[-1],
        )
        for match in _FENCE.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.M)), f"{page}: a block is not closed"
    return [block for block in found if language in (None, block.language)]


def rows(page: Path) -> list[list[str]]:
    """The cells of all tables of a page, without heads and rules."""
    lines = page.read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    rules = {number for number, line in enumerate(tables) if set(line) <= set("|- :")}
    kept = [line for number, line in enumerate(tables) if number not in rules and number + 1 not in rules]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in kept]
