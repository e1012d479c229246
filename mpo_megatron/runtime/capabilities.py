"""Which of the libraries for GPUs can really be used: found out by importing them, once.

That a package is there says little: FlashAttention 4 alone has no variable-length kernel under the name of version 2,
and an extension that was built for another torch fails when it is loaded.
"""

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from mpo_megatron.runtime.facts import Library

# Of Megatron-core: from the first to before the second.
MEGATRON_CORE = ((0, 16), (0, 20))
# The first Transformer Engine whose layers Megatron-core 0.16 and our attention can use.
TRANSFORMER_ENGINE = (2, 2)
# The first Triton that the response head's kernels were run with.
TRITON = (3, 2)


def _named(name: str, package: str) -> str:
    try:
        return f"{name} {version(package)}"
    except PackageNotFoundError:
        return name


def _failure(package: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package:
        return "is not installed"
    return f"cannot be imported ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"


@cache
def megatron_core() -> Library:
    """Megatron-core, at a version that this package works with."""
    name = _named("megatron-core", "megatron-core")
    try:
        import megatron.core  # noqa: F401
    except Exception as error:
        return Library(name, _failure("megatron", error))
    first, beyond = (".".join(map(str, pair)) for pair in MEGATRON_CORE)
    found = version_numbers(name.removeprefix("megatron-core").strip() or first)
    fits = MEGATRON_CORE[0] <= found < MEGATRON_CORE[1]
    return Library(name, None if fits else f"is not from {first} to before {beyond}")


@cache
def nemo() -> Library:
    """NeMo's configuration and experiment manager."""
    name = _named("nemo-toolkit", "nemo-toolkit")
    try:
        from nemo.core.config import hydra_runner  # noqa: F401
        from nemo.utils.exp_manager import exp_manager  # noqa: F401
    except Exception as error:
        return Library(name, _failure("nemo", error))
    return Library(name)


@cache
def transformer_engine() -> Library:
    """Transformer Engine's layers, as Megatron-core would use them."""
    name = _named("Transformer Engine", "transformer-engine")
    try:
        import transformer_engine.pytorch  # noqa: F401  (its import loads the extension)
        from megatron.core.extensions.transformer_engine import HAVE_TE
    # What a broken installation raises is anything: OSError, AssertionError, RuntimeError, ...
    except Exception as error:
        return Library(name, _failure("transformer_engine", error))
    found = name.removeprefix("Transformer Engine").strip()
    numbers = version_numbers(found) if found else (0, 0)
    if found and numbers < TRANSFORMER_ENGINE:
        return Library(
            name, f"is too old; {'.'.join(map(str, TRANSFORMER_ENGINE))} or later is needed", numbers
        )
    return Library(name, None if HAVE_TE else "could not be imported by Megatron-core", numbers)


@cache
def flash_attention() -> Library:
    """FlashAttention's kernel for sequences of different lengths, of the flash-attn package."""
    name = _named("flash-attn", "flash-attn")
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:
        return Library(name, _failure("flash_attn", error))
    return Library(name)


@cache
def flash_attention_3() -> Library:
    """FlashAttention's kernels for Hopper, a package of their own."""
    name = _named("flash-attn 3", "flash_attn_3")
    try:
        import flash_attn_interface  # noqa: F401
    except Exception as error:
        return Library(name, _failure("flash_attn_interface", error))
    return Library(name)


@cache
def apex() -> Library:
    """NVIDIA's apex, as Megatron-core would use it; the package of this name on PyPI is another."""
    name = _named("apex", "apex")
    try:
        from apex.multi_tensor_apply import multi_tensor_applier  # noqa: F401
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception as error:
        return Library(name, _failure("apex", error))
    return Library(name)


@cache
def torch_varlen_attention() -> Library:
    """torch's own kernel for sequences of different lengths: before 2.13 it has no grouped-query attention."""
    name = f"torch {torch.__version__}"
    return Library(
        name, None if version_numbers(torch.__version__) >= (2, 13) else "is too old; 2.13 is needed"
    )


@cache
def triton() -> Library:
    """Triton, which comes with torch's builds for GPUs."""
    name = _named("triton", "triton")
    try:
        import triton
        import triton.language
    except Exception as error:
        return Library(name, _failure("triton", error))
    numbers = version_numbers(triton.__version__)
    too_old = f"is too old; {'.'.join(map(str, TRITON))} or later is needed"
    return Library(name, None if numbers >= TRITON else too_old, numbers)


def version_numbers(text: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cu130"."""
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def settings() -> list[str]:
    """What of the environment decides how fast a GPU run is, as "NAME=value" or "NAME not set"."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN")
    set_ = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return (
        set_
        if "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ
        else ["CUDA_DEVICE_MAX_CONNECTIONS not set", *set_]
    )
