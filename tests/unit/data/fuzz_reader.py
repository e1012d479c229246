"""Looks for a file of data that the reader answers with anything but groups or a sentence, led by its coverage.

    python tests/unit/data/fuzz_reader.py -runs=100000 [CORPUS] [OPTIONS OF LIBFUZZER]

atheris keeps the inputs that reach new code of mpo_megatron.data and changes them further: here the JSON of a line as a
tree, so that most inputs are records, and the bytes of one in eight, of which the first says what kind of file it is.
What fails is written to crash-* in the working directory; with such a file as CORPUS only that is tried.
"""

import copy
import gzip
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["mpo_megatron.data"]):
    from tests.helpers.reading import check_file

NAMES = ("data.jsonl", "data.json", "data.jsonl.gz")
KEYS = (
    "id", "prompt_id", "prompt", "messages", "instruction", "responses", "text", "score", "label", "finish_reason",
    "completions", "response", "overall_score", "chosen", "rejected", "score_chosen", "rejected_score",
    "all_generated_responses", "all_rm_scores", "role", "content",
)  # fmt: skip
LEAVES: tuple[Any, ...] = (
    None, True, 0, -1, 2.5, 1e39, 10**400, float("nan"), float("inf"), [], {}, [[]], "", " \n", "x", "\ud83d",
    "preferred", "user", "assistant", "system", "length", "long " * 99,
)  # fmt: skip
_ASKED = {"role": "user", "content": "Name a colour."}
_RED, _DOG = ({"role": "assistant", "content": content} for content in ("Red", "Dog"))
SEEDS: tuple[dict[str, Any], ...] = (
    {"id": "a", "prompt": "x", "responses": [{"text": "Red", "score": 1}, {"text": "Dog", "score": 0.5}]},
    {"messages": [_ASKED],
     "responses": [{"text": "Red", "label": "preferred"}, {"text": "Dog", "label": "dispreferred"}]},
    {"instruction": "x",
     "completions": [{"response": "Red", "overall_score": 8}, {"response": "Dog", "overall_score": 1}]},
    {"prompt": "x", "all_generated_responses": ["Red", "Dog"], "all_rm_scores": [1.5, -2]},
    {"prompt": "x", "chosen": "Red", "rejected": "Dog", "score_chosen": 2, "score_rejected": 1},
    {"chosen": [_ASKED, _RED], "rejected": [_ASKED, _DOG]},
)  # fmt: skip


def changed(value: Any, draw: random.Random) -> Any:
    """The tree with one place changed."""
    at_leaf = not isinstance(value, dict | list) or not value
    if at_leaf or draw.random() < 0.2:
        return copy.deepcopy(draw.choice((*LEAVES, *SEEDS)) if draw.random() < 0.8 else [value])
    place = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = draw.random()
    if how < 0.1:
        del value[place]
    elif how < 0.2:
        if isinstance(value, dict):
            value[draw.choice(KEYS)] = value[place]
        else:
            value.insert(place, copy.deepcopy(value[place]))
    else:
        value[place] = changed(value[place], draw)
    return value


def mutate(data: bytes, largest: int, seed: int) -> bytes:
    """Change a line's record, or repeat the line, or leave it to libFuzzer, which knows bytes."""
    draw = random.Random(seed)
    lines = data[1:].split(b"\n")
    number = draw.randrange(len(lines))
    try:
        record = json.loads(lines[number])
    except (ValueError, RecursionError):
        record = None
    if record is None or draw.random() < 0.125:
        return bytes(atheris.Mutate(data, largest))
    if draw.random() < 0.1:
        lines.append(lines[number])
    else:
        for _ in range(draw.randint(1, 3)):
            record = changed(record, draw)
        lines[number] = json.dumps(record, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    return (data[:1] + b"\n".join(lines))[:largest]


def main(arguments: list[str], check: Callable[[Path], None] = check_file) -> None:
    """Fuzz until libFuzzer's options say that it is enough, which ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder, "seeds")
        seeds.mkdir()
        for number, record in enumerate(SEEDS):
            line = json.dumps(record).encode()
            for kind, content in enumerate((line + b"\n" + line, b"[" + line + b"]", line)):
                (seeds / f"{number}-{kind}").write_bytes(bytes([kind]) + content)

        def one_input(data: bytes) -> None:
            kind = data[0] % len(NAMES) if data else 0
            path = Path(folder, NAMES[kind])
            path.write_bytes(gzip.compress(data[1:], 1) if kind == 2 else data[1:])
            check(path)

        given = (
            arguments if any(Path(argument).is_file() for argument in arguments) else [*arguments, str(seeds)]
        )
        atheris.Setup([sys.argv[0], "-max_len=8192", *given], one_input, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
