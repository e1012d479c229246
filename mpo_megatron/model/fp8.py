"""8-bit products in Transformer Engine's layers: the recipes, and what each needs of the chip, the model and the rows.

The embedding, the norms, attention's scores and the response head stay in bf16, and so do weights and checkpoints: each
product casts its operands.
"""

import math
from dataclasses import dataclass

import torch

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.runtime.facts import Pair, dotted


@dataclass(frozen=True)
class Recipe:
    """How scales are found.

    What a machine needs is what Transformer Engine 2.20 (pytorch/quantization.py) and Megatron-core 0.16 (fp8_utils.py)
    ask when the first layer runs.

    Attributes:
        capability: the least CUDA compute capability.
        chips: those that have it, for people.
        multiple: of the sizes of matrices on a tensor-parallel rank, and of a rank's tokens of a row.
        scales: what a scale is of, for people.
        below: the compute capability from which it is missing again; None: none.
        cuda: the first CUDA that torch must have been built with.
        transformer_engine: the first version that has it.
    """

    capability: Pair
    chips: str
    multiple: int
    scales: str
    below: Pair | None = None
    cuda: Pair = (12, 1)
    transformer_engine: Pair = (2, 2)


RECIPES = {
    "delayed": Recipe((8, 9), "Ada, Hopper or later", 16, "a tensor in earlier steps"),
    "tensorwise": Recipe((8, 9), "Ada, Hopper or later", 16, "a tensor as it is"),
    "blockwise": Recipe(
        (9, 0), "Hopper or later", 128, "blocks of 128 numbers", cuda=(12, 9), transformer_engine=(2, 3)
    ),
    "mxfp8": Recipe(
        (10, 0), "the Blackwell chips of data centres", 32, "blocks of 32 numbers", below=(12, 0)
    ),
}


@dataclass(frozen=True)
class Machine:
    """What decides which recipes run: the GPU's compute capability, and the versions of the libraries."""

    capability: Pair
    cuda: Pair
    transformer_engine: Pair


@dataclass(frozen=True)
class Fp8:
    """The setting of a run.

    Attributes:
        format: `hybrid` (gradients with a wider range: e5m2) or `e4m3` (all numbers).
        recipe: a name of RECIPES.
        first_bf16: layers at the model's beginning that stay in bf16.
        last_bf16: layers at its end that do.
    """

    format: str
    recipe: str = "tensorwise"
    first_bf16: int = 0
    last_bf16: int = 0

    def __str__(self) -> str:
        kept = f", the first {self.first_bf16} and last {self.last_bf16} layers in bf16"
        layers = kept if self.first_bf16 or self.last_bf16 else ""
        return f"FP8 {self.format}, a scale of {RECIPES[self.recipe].scales} ({self.recipe}){layers}"

    @property
    def repeats_itself(self) -> bool:
        """Whether one row gives the same numbers whenever it runs with the same weights: delayed scales have a past."""
        return self.recipe != "delayed"

    def row_alignment(self, tp: int) -> int:
        """What a row's tokens on a context-parallel rank are a multiple of."""
        return RECIPES[self.recipe].multiple * tp


def check_fp8(fp8: Fp8, architecture: Architecture, tp: int) -> None:
    """Check that the model's matrices can be multiplied in 8 bits on each of `tp` tensor-parallel ranks.

    Raises:
        ConfigError: a size is not a multiple of what the recipe needs, or the model has what FP8 is not built for here.
    """
    if architecture.experts is not None:
        raise ConfigError(
            "model.fp8: a mixture of experts trains in bf16 here, since an expert's tokens would have to be padded; "
            "remove model.fp8"
        )
    if fp8.first_bf16 + fp8.last_bf16 >= architecture.num_layers:
        raise ConfigError(
            f"model.num_layers_at_start_in_bf16={fp8.first_bf16} and model.num_layers_at_end_in_bf16={fp8.last_bf16} "
            f"leave none of the model's {architecture.num_layers} layers to FP8; remove model.fp8 or lower them"
        )
    multiple = RECIPES[fp8.recipe].multiple
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    for name, size in (
        ("hidden size", architecture.hidden_size),
        ("rows of queries, keys and values on a tensor-parallel rank", (queries + 2 * keys) // tp),
        ("attention output on a tensor-parallel rank", queries // tp),
        ("feed-forward size on a tensor-parallel rank", architecture.ffn_hidden_size // tp),
    ):
        if size % multiple:
            raise ConfigError(
                f"model.fp8_recipe={fp8.recipe} multiplies matrices whose sizes are multiples of {multiple}, and the "
                f"{name} is {size}; set model.fp8=null, {_smaller(multiple)}or model.tensor_model_parallel_size to "
                f"another than {tp}"
            )


def _smaller(multiple: int) -> str:
    fitting = [name for name, recipe in RECIPES.items() if recipe.multiple < multiple]
    return f"model.fp8_recipe to {' or '.join(fitting)}, " if fitting else ""


def check_machine(fp8: Fp8, machine: Machine) -> None:
    """Check that this machine has the recipe.

    Raises:
        ConfigError: it has not.
    """
    problem = _lacks(RECIPES[fp8.recipe], machine)
    if problem is not None:
        have = [name for name, other in RECIPES.items() if _lacks(other, machine) is None]
        fix = (
            f"choose {' or '.join(have)}" if have else "remove model.fp8: bf16 is what this GPU is fastest in"
        )
        raise ConfigError(f"model.fp8_recipe={fp8.recipe} needs {problem}; {fix}")


def _lacks(recipe: Recipe, machine: Machine) -> str | None:
    """What the recipe needs and what there is instead; None: the machine has it."""
    beyond = recipe.below is not None and machine.capability >= recipe.below
    if machine.capability < recipe.capability or beyond:
        needed = f"compute capability {dotted(recipe.capability)}"
        if recipe.below is not None:
            needed += f" or more and below {dotted(recipe.below)}"
        return f"{recipe.chips} ({needed}), and this GPU has {dotted(machine.capability)}"
    if machine.cuda < recipe.cuda:
        return f"a torch for CUDA {dotted(recipe.cuda)} or later, and this one is for {dotted(machine.cuda)}"
    if machine.transformer_engine < recipe.transformer_engine:
        needed, found = dotted(recipe.transformer_engine), dotted(machine.transformer_engine)
        return f"Transformer Engine {needed} or later, and this is {found}"
    return None


def row_alignment(fp8: Fp8 | None, tp: int, device: torch.device, multiple: int | None = None) -> int:
    """What the tokens of a row on a context-parallel rank are a multiple of.

    Sequence parallelism cuts rows into equal parts. Kernels like multiples of 8 on a CPU and of 64 on a GPU, whose
    memory falls into fewer pieces the fewer lengths there are: of UltraFeedback-like groups in rows of at most 8,192
    tokens, 128 groups a step on 8 ranks, 19 lengths instead of 859, for 0.5% of padding.

    Args:
        multiple: another one than these (`model.pack.pad_to_multiple_of`).
    """
    plain = math.lcm(tp, multiple or (64 if device.type == "cuda" else 8))
    return plain if fp8 is None else math.lcm(plain, fp8.row_alignment(tp))
