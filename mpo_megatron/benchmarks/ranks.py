"""A benchmark's function on several CPU ranks, each a process of its own with one thread.

As a module, `python -m mpo_megatron.benchmarks.ranks MODULE FUNCTION ARGUMENTS` is one rank; the last line that rank 0
prints is what all of them have found.
"""

import importlib
import json
import subprocess
import sys
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.runtime.commands import torchrun


def on_ranks(count: int, module: str, function: str, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` of a module of the benchmarks gives on each rank.

    Args:
        module: its name in this package.
        arguments: what JSON can hold; so is what the function returns.

    Raises:
        UserError: a rank has failed.
    """
    command = [
        *torchrun(count),
        "-m",
        "mpo_megatron.benchmarks.ranks",
        module,
        function,
        json.dumps(arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the ranks ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: list[Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(module: str, function: str, arguments: list[Any]) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    from mpo_megatron.runtime.parallel import shutdown

    torch.set_num_threads(1)
    found = getattr(importlib.import_module(f"mpo_megatron.benchmarks.{module}"), function)(*arguments)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
