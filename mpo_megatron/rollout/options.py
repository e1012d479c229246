"""Command-line options that tools/generate.py and tools/score.py share: a model, and where it runs."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from mpo_megatron.errors import UserError


def add_placement(add: Callable[..., Any], shared: str) -> None:
    """Add --dtype, --device and --processes by an `add_argument`; `shared` is what the processes share."""
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="float32",
        help="bfloat16 is quicker on GPUs (default %(default)s)",
    )
    add("--device", default=None, help="torch device; left out: cuda where there is one, otherwise cpu")
    add(
        "--processes",
        type=int,
        default=1,
        help=f"processes that share the {shared}, each with a model of its own (default %(default)s)",
    )


def check_at_least_one(args: Namespace, *options: str) -> None:
    """Raises UserError if one of the options is given and below 1."""
    for option in options:
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be at least 1")
