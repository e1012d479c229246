"""What the ranks of these tests do once, before anything else, and after each case."""

from typing import Any

from tests.helpers.without import GPU_LIBRARIES, hide


def set_up_cpu() -> None:
    """A CPU rank as on a machine without a GPU: what is there for GPUs would be taken, and needs one."""
    hide(GPU_LIBRARIES)
    from tests.distributed import rank_setup

    rank_setup.set_up()


# Of ranks on GPUs. Products of float32 numbers are in float32, Transformer Engine's too: without it they are in TF32.
GPU_ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def tear_down_gpu() -> None:
    """Transformer Engine keeps amax histories for the whole process."""
    import torch
    from megatron.core import parallel_state

    from mpo_megatron.runtime import capabilities

    torch.cuda.set_sync_debug_mode("default")
    if capabilities.transformer_engine().problem is None:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    parallel_state.destroy_model_parallel()


def problem_of(library: str) -> str | None:
    """Why a library of `runtime.capabilities` cannot be used on this rank; None: it can."""
    from mpo_megatron.runtime import capabilities

    found: Any = getattr(capabilities, library)()
    return found.problem and str(found)


def attention_problem(name: str, accelerator: str) -> str | None:
    """Why an attention backend cannot run in bf16 on this rank; None: it can."""
    import torch

    from mpo_megatron.model.attention import no_backend
    from mpo_megatron.runtime.device import choose_device

    return no_backend(name, choose_device(accelerator), torch.bfloat16)


def fp8_problem(recipe: str) -> str | None:
    """Why this rank's GPU does not run an FP8 recipe; None: it does."""
    import torch

    from mpo_megatron.errors import ConfigError
    from mpo_megatron.model.fp8 import Fp8, Machine, check_machine
    from mpo_megatron.runtime import capabilities

    cuda = capabilities.version_numbers(torch.version.cuda or "0.0")
    engine = capabilities.transformer_engine()
    if engine.problem is not None:
        return str(engine)
    try:
        check_machine(
            Fp8("hybrid", recipe), Machine(torch.cuda.get_device_capability(), cuda, engine.version)
        )
    except ConfigError as error:
        return str(error)
    return None
