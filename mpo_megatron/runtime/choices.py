"""Which layers and which attention a run takes: the rules, apart from the machine that they are applied to."""

from collections.abc import Mapping, Sequence

from mpo_megatron.runtime.facts import Library, Pair

# In the order in which `auto` tries them.
ATTENTION = ("varlen", "te", "sdpa")
HEAD = ("triton", "eager")
_KERNELS_CAPABILITY: Pair = (8, 0)


def layers_problem(on_gpu: bool, sixteen_bits: bool, library: Library) -> str | None:
    """Why the layers cannot come from Transformer Engine; None: they can."""
    if not on_gpu:
        return "Transformer Engine needs a GPU"
    if not sixteen_bits:
        return (
            "Transformer Engine's products of float32 numbers are in TF32, so it needs trainer.precision=bf16"
        )
    return library.problem and str(library)


def attention_problem(
    backend: str, on_gpu: bool, sixteen_bits: bool, capability: Pair, libraries: Sequence[Library]
) -> str | None:
    """Why an attention backend cannot run; None: it can.

    Args:
        libraries: those with its kernel; one has to be usable.
    """
    if backend == "sdpa":
        return None
    if not on_gpu:
        return "it needs a GPU"
    if not sixteen_bits:
        return "its kernels take 16 bits alone, so it needs trainer.precision=bf16"
    if capability < _KERNELS_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or more"
    if any(library.problem is None for library in libraries):
        return None
    return ", and ".join(map(str, libraries))


def head_problem(backend: str, on_gpu: bool, bf16: bool, capability: Pair, library: Library) -> str | None:
    """Why what computes the response head cannot run; None: it can.

    Args:
        library: Triton.
    """
    if backend == "eager":
        return None
    if not on_gpu:
        return "it needs a GPU"
    if not bf16:
        return "its products are for bf16, so it needs trainer.precision=bf16"
    if capability < _KERNELS_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or more"
    return library.problem and str(library)


def attention(capability: Pair, libraries: Mapping[str, Library]) -> tuple[str, str]:
    """The backend that `auto` takes for bf16 on a GPU, and the library whose kernel it is.

    Args:
        libraries: as `Facts.libraries`.
    """
    kernels = {
        "varlen": [libraries[name] for name in ("flash-attn", "torch varlen") if name in libraries],
        "te": [libraries[name] for name in ("transformer-engine",) if name in libraries],
        "sdpa": [Library("torch")],
    }
    backend = next(
        name for name in ATTENTION if attention_problem(name, True, True, capability, kernels[name]) is None
    )
    return backend, next(library.name for library in kernels[backend] if library.problem is None)
