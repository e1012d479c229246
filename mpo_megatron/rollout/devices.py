"""Where a process's model runs, and in what type."""

import os

import torch

from mpo_megatron.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def dtype_of(name: str) -> torch.dtype:
    """Raises UserError for a name that is not in `DTYPES`."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def place(device: str | None, processes: int, number: int) -> str:
    """The device of process `number`. Of several processes each takes its share of the cores, and the GPUs in turn.

    Args:
        device: torch's name; None: a GPU where there is one. "cuda" is any GPU, "cuda:1" that one.

    Raises UserError for a device that torch cannot use here.
    """
    if processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    gpus = torch.cuda.device_count()
    if device is None or (device == "cuda" and gpus):
        return f"cuda:{number % gpus}" if gpus else "cpu"
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # torch raises AssertionError and RuntimeError, NotImplementedError, ...
        problem = str(error).partition("\n")[0]
        raise UserError(
            f"--device {device} cannot be used here ({problem}); leave it out to have what there is"
        ) from error
    return device
