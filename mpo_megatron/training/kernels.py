"""Which kernels a run has: a fast path that was lost is said at the start, not found out from the bill."""

from mpo_megatron.model.attention import no_backend, varlen_libraries
from mpo_megatron.model.head import no_head
from mpo_megatron.model.provider import ModelOptions, no_transformer_engine
from mpo_megatron.runtime import capabilities
from mpo_megatron.runtime.doctor import devices, judge
from mpo_megatron.runtime.facts import Facts
from mpo_megatron.runtime.findings import NOTE
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.runtime.probe import LIBRARIES, probe


def kernels(options: ModelOptions, layout: ParallelLayout, num_heads: int, max_length: int) -> list[str]:
    """Lines on what the layers, attention and head of a GPU run are, and why not faster ones; of a CPU run none.

    Args:
        num_heads: of the whole model.
        max_length: tokens of the longest prompt with response.
    """
    if layout.device.type != "cuda":
        return []
    if options.transformer_engine:
        fused = ", weight gradients fused" if options.fuse_weight_gradients else ""
        layers = f"layers of {capabilities.transformer_engine().name}{fused}"
    else:
        problem = no_transformer_engine(layout.device, options.dtype) or "model.transformer_impl=local"
        layers = f"Megatron-core's own layers ({problem})"
    if options.attention_backend == "sdpa":
        gigabytes = num_heads // layout.tp * max_length**2 * options.dtype.itemsize / 1e9
        problem = no_backend("varlen", layout.device, options.dtype) or "model.attention_backend=sdpa"
        attention = (
            f"sdpa ({problem}), which may store scores: up to {gigabytes:.2g} GB for each layer and response of "
            f"{max_length} tokens"
        )
    elif options.attention_backend == "te":
        attention = f"of {capabilities.transformer_engine().name}"
    else:
        usable = next(library for library in varlen_libraries() if library.problem is None)
        attention = f"varlen, of {usable.name}"
    if options.head_backend == "triton":
        head = f"of {capabilities.triton().name}"
    else:
        head = f"eager ({no_head('triton', layout.device, options.dtype) or 'model.head_backend=eager'})"
    return [
        f"kernels     {layers}; attention {attention}; head {head}",
        f"            {', '.join(capabilities.settings())}",
    ]


def costs(accelerator: str, layout: ParallelLayout) -> list[str]:
    """Lines on what this machine lacks, what the run uses instead and what that costs; see `runtime.doctor`."""
    if layout.device.type == "cuda":
        return costs_of(
            probe(libraries=[name for name in LIBRARIES if name not in ("megatron-core", "nemo")])
        )
    # A CPU that was asked for is no loss.
    return costs_of(probe(libraries=())) if accelerator == "auto" else []


def costs_of(facts: Facts) -> list[str]:
    """The same, of a machine's facts."""
    findings = judge(facts) if facts.gpus else devices(facts)
    return [f"costs       {finding}" for finding in findings if finding.level != NOTE]
