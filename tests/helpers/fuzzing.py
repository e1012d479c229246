"""What fuzz tests share: how many inputs, their count, and what an error may look like.

How many inputs were tried is printed (pytest -s); HYPOTHESIS_MULTIPLE=10 tries ten times as many.
"""

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

MULTIPLE = int(os.environ.get("HYPOTHESIS_MULTIPLE", "1"))
LONGEST_MESSAGE = 1500
TRIED: Counter[str] = Counter()

# Halves of characters beyond the basic plane, lines and spaces among others. As the alphabet of `st.text` they would be
# a few of a million characters, of which it takes any.
_AWKWARD = st.lists(st.characters() | st.sampled_from("\ud83d\udd8a \n\x00\u2028"), max_size=12).map("".join)
TEXT = st.text(max_size=20) | _AWKWARD | st.just("long " * 999)
NUMBERS = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2, 10**309, -(10**400), 1e39, -1e308])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT


def tries(number: int) -> Any:
    """Settings of a test with so many inputs, the same in every run."""
    return settings(
        max_examples=number * MULTIPLE, deadline=None, derandomize=True, database=None, report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate],  # to shrink an input may take minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def check_message(error: Exception, place: str = "") -> None:
    """It is one sentence that can be printed, and begins with the place."""
    message = str(error)
    assert message.startswith(place)
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE + len(place)
    message.encode()


@st.composite
def damaged(draw: Any, data: bytes, pieces: tuple[bytes, ...] = (b"\n",), within: int | None = None) -> bytes:
    """Bytes with some changed, left out or put in.

    Args:
        pieces: that are put in, beside any bytes.
        within: how far from the start; None: anywhere.
    """
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, min(len(changed), within or len(changed))))
        kind = draw(st.sampled_from(["change", "remove", "insert", "cut"]))
        if kind == "change" and place < len(changed):
            changed[place] = draw(st.integers(0, 255))
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, 20))]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(max_size=8) | st.sampled_from(pieces))
        else:
            del changed[place:]
    return bytes(changed)


def changed(content: Any, values: Any) -> Any:
    """A strategy: nested mappings and lists with one to three things in them set to one of `values`, or removed."""
    places = sorted(_places(content), key=str)
    change = st.tuples(st.sampled_from(places), values, st.integers(0, 5))
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _applied(content, changes))


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*place, key)
        yield from _places(below, (*place, key))


def _applied(content: Any, changes: list[tuple[tuple[Any, ...], Any, int]]) -> Any:
    content = copy.deepcopy(content)
    for place, value, removed in changes:
        holder = content
        # An earlier change may have taken away what holds it.
        with contextlib.suppress(LookupError, TypeError):
            for key in place[:-1]:
                holder = holder[key]
            if removed == 0:
                del holder[place[-1]]
            else:
                holder[place[-1]] = value
    return content
