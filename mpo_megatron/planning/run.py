"""How a model is trained, as far as memory, FLOPs and communication depend on it."""

from dataclasses import dataclass
from functools import cached_property

from mpo_megatron.model.stages import stage_layers
from mpo_megatron.scheduling.plan import Pipeline


@dataclass(frozen=True)
class Recompute:
    """Which activations the backward pass computes again, as in Megatron's TransformerConfig.

    Attributes:
        granularity: None | selective (the scores of attention) | full (whole layers).
        method: uniform (all layers, `num_layers` at a time) | block (the first `num_layers` of each chunk), for full.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None

    def __str__(self) -> str:
        if self.granularity != "full":
            return self.granularity or "none"
        return (
            "full" if (self.method, self.num_layers) == ("uniform", 1) else f"{self.method} {self.num_layers}"
        )

    def layers(self, chunk: int) -> int:
        """How many of a chunk's layers run again as a whole."""
        if self.granularity != "full":
            return 0
        return chunk if self.method == "uniform" else min(chunk, self.num_layers or 0)

    def checkpoints(self, chunk: int) -> int:
        """How many layer inputs a chunk keeps in the place of activations."""
        layers = self.layers(chunk)
        return -(-layers // (self.num_layers or 1)) if self.method == "uniform" else layers

    def at_a_time(self, chunk: int) -> int:
        """How many layers' activations exist again at a time."""
        return min(self.num_layers or 1, chunk) if self.method == "uniform" else min(1, self.layers(chunk))


NO_RECOMPUTE = Recompute()
FULL = Recompute("full", "uniform", 1)


@dataclass(frozen=True)
class Run:
    """Layout and settings of a run.

    Attributes:
        element: bytes of a weight or an activation: 2 in bf16, 4 in float32.
        fp8: whether products cast their operands to 8 bits.
        transformer_engine: whether the layers are Transformer Engine's; Megatron's local ones otherwise.
        fused: whether Megatron's fused operations run, as they do on GPUs: SwiGLU, and RMSNorm without its own
            float32 copies.
        attention: the backend: `varlen` and `te` keep the keys and values of all segments; `sdpa` also the masks.
        token_multiple: what a row's tokens on a context-parallel rank are a multiple of (model.fp8.row_alignment).
        overlap_grad_reduce, overlap_param_gather: as in training.data_parallel.DataParallel.
        max_tokens: token budget of a row.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    first_stage: int | None = None
    last_stage: int | None = None
    recompute: Recompute = NO_RECOMPUTE
    element: int = 2
    fp8: bool = False
    transformer_engine: bool = True
    fused: bool = True
    attention: str = "varlen"
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    vocab_multiple: int = 128
    head_chunk: int = 1024
    token_multiple: int = 64
    max_tokens: int = 8192
    shared_prompt: bool = True
    # All rows run forward only before: for objectives that need the whole global batch.
    two_passes: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense weights: what the distributed optimizer is shared among."""
        return self.cp * self.dp

    @property
    def sequence_ranks(self) -> int:
        """Tensor-parallel ranks that share the tokens outside attention and feed-forward parts."""
        return self.tp if self.sequence_parallel else 1

    @property
    def alignment(self) -> int:
        """The length of a row is a multiple of it."""
        return self.token_multiple * self.cp

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.pp, self.vpp)

    def chunks(self, num_layers: int, stage: int) -> list[int]:
        """Layers of each of a pipeline stage's chunks."""
        layers = stage_layers(num_layers, self.pp, self.first_stage, self.last_stage)[stage]
        return [layers // self.vpp] * self.vpp

    def __str__(self) -> str:
        named = (
            ("TP", self.tp),
            ("PP", self.pp),
            ("VPP", self.vpp),
            ("CP", self.cp),
            ("DP", self.dp),
            ("EP", self.ep),
        )
        return " ".join(f"{name}{size}" for name, size in named if size > 1) or "one rank"


def different_stages(run: Run) -> list[int]:
    """Pipeline stages of which no other one does more, or holds more: the first, the second, and the last.

    Those between hold as many layers as the second, and fewer rows at a time.
    """
    return sorted({0, min(1, run.pp - 1), run.pp - 1})
