"""Cutting a response into words, sentences and paragraphs."""

import re

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_LIST_MARKER = re.compile(r"^\s*(?:[-*•+]|\d+[.)])\s+(?=\S)")


def words(text: str) -> list[str]:
    """The words of `text`, in lower case: letters and digits, joined by inner apostrophes and hyphens."""
    return WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """Pieces that end in . ! or ?, or with their line; list markers such as "1." do not count as sentences."""
    pieces = []
    for line in text.splitlines():
        pieces += re.split(r"(?<=[.!?])[\"'”’)*]*\s+", _LIST_MARKER.sub("", line))
    return [piece.strip() for piece in pieces if WORD.search(piece)]


def paragraphs(text: str) -> list[str]:
    """Blocks of text between blank lines."""
    return [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
