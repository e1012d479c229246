"""The device of this run: decided once, before anything touches CUDA."""

import os

import torch

from mpo_megatron.errors import ConfigError
from mpo_megatron.runtime import cpu


def choose_device(accelerator: str) -> torch.device:
    """Decide between the GPU and the CPU for this process, and make Megatron-core fit the choice.

    Args:
        accelerator: `gpu`, `cpu`, or `auto` for the GPU where there is one.

    Returns:
        This process's device: `cuda:LOCAL_RANK` or `cpu`.

    Raises:
        ConfigError: a GPU was asked for and there is none, or fewer than processes on this node.
    """
    has_gpu = torch.cuda.is_available() and not cpu.is_installed()
    if accelerator == "cpu" or (accelerator == "auto" and not has_gpu):
        cpu.install()
        return torch.device("cpu")
    if not has_gpu:
        raise ConfigError(
            "trainer.accelerator=gpu, but torch finds no GPU here; install a CUDA build of torch on a machine "
            "with a GPU, or set trainer.accelerator=cpu"
        )
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise ConfigError(
            f"{processes} processes were started on a node with {gpus} GPU{'s' * (gpus > 1)}; "
            "start at most one for each GPU (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
