"""What FP8 needs, before a model is built: sizes, chips, rows; each refusal is one sentence with what to change."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.fp8 import RECIPES, Fp8, Machine, check_fp8, check_machine, row_alignment

LLAMA_8B = {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
            "num_layers": 32, "experts": None}  # fmt: skip
SMOLLM2 = {"hidden_size": 576, "ffn_hidden_size": 1536, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
           "num_layers": 30, "experts": None}  # fmt: skip


def architecture(sizes: dict[str, Any], **changes: Any) -> Any:
    return SimpleNamespace(**{**sizes, **changes})


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_8b_model_fits_every_recipe_at_up_to_8_ranks(recipe: str) -> None:
    for tp in (1, 2, 4, 8):
        check_fp8(Fp8("hybrid", recipe), architecture(LLAMA_8B), tp)


@pytest.mark.parametrize(
    ("fp8", "sizes", "tp", "message"),
    [
        (
            Fp8("hybrid", "blockwise"), architecture(SMOLLM2), 1,
            "multiples of 128, and the hidden size is 576; set model.fp8=null, model.fp8_recipe to delayed or "
            "tensorwise or mxfp8, or model.tensor_model_parallel_size to another than 1",
        ),
        (
            Fp8("hybrid"), architecture(LLAMA_8B, ffn_hidden_size=14344), 1,
            "multiples of 16, and the feed-forward size on a tensor-parallel rank is 14344; set model.fp8=null, or "
            "model.tensor_model_parallel_size to another than 1",
        ),
        (Fp8("hybrid"), architecture(SMOLLM2, head_dim=24), 3, "the rows of queries, keys and values on a tensor-p"),
        (Fp8("hybrid"), architecture(LLAMA_8B, experts=object()), 1, "a mixture of experts trains in bf16 here"),
        (
            Fp8("hybrid", first_bf16=16, last_bf16=16), architecture(LLAMA_8B), 1,
            "leave none of the model's 32 layers to FP8",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(fp8: Fp8, sizes: Any, tp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_fp8(fp8, sizes, tp)
    assert "\n" not in str(caught.value)


def test_smollm2_fits_scaling_by_tensor() -> None:
    for recipe in ("delayed", "tensorwise", "mxfp8"):
        check_fp8(Fp8("hybrid", recipe), architecture(SMOLLM2), 1)


def machine(*capability: int, cuda: tuple[int, int] = (13, 0), library: tuple[int, int] = (2, 20)) -> Machine:
    return Machine((capability[0], capability[1]), cuda, library)


@pytest.mark.parametrize(
    ("recipe", "machine", "message"),
    [
        ("tensorwise", machine(8, 0), "needs Ada, Hopper or later (compute capability 8.9), and this GPU has 8.0; "
                                      "remove model.fp8: bf16 is what this GPU is fastest in"),
        ("mxfp8", machine(9, 0), "needs the Blackwell chips of data centres (compute capability 10.0 or more and "
                                 "below 12.0), and this GPU has 9.0; choose delayed or tensorwise or blockwise"),
        ("mxfp8", machine(12, 0), "below 12.0), and this GPU has 12.0; choose delayed or tensorwise or blockwise"),
        ("blockwise", machine(8, 9), "and this GPU has 8.9; choose delayed or tensorwise"),
        ("blockwise", machine(9, 0, cuda=(12, 8)), "needs a torch for CUDA 12.9 or later, and this one is for 12.8; "
                                                   "choose delayed or tensorwise"),
        ("blockwise", machine(9, 0, library=(2, 2)), "needs Transformer Engine 2.3 or later, and this is 2.2; choose"),
    ],
)  # fmt: skip
def test_a_recipe_that_the_machine_lacks(recipe: str, machine: Machine, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_machine(Fp8("hybrid", recipe), machine)
    assert "\n" not in str(caught.value)


def test_recipes_that_machines_have() -> None:
    for recipe in ("delayed", "tensorwise", "blockwise"):
        check_machine(Fp8("hybrid", recipe), machine(9, 0, cuda=(12, 9)))
    for recipe in ("delayed", "tensorwise"):
        check_machine(Fp8("hybrid", recipe), machine(8, 9))
    check_machine(Fp8("e4m3", "mxfp8"), machine(10, 0))


def test_rows_are_multiples_of_what_kernels_and_recipes_need() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert row_alignment(None, 4, gpu) == 64
    assert row_alignment(None, 3, cpu) == 24
    assert row_alignment(None, 4, gpu, 512) == 512
    assert row_alignment(None, 3, cpu, 4) == 12
    assert row_alignment(Fp8("hybrid"), 8, gpu) == 128
    assert row_alignment(Fp8("hybrid", "blockwise"), 2, gpu) == 256
    assert row_alignment(Fp8("hybrid", "mxfp8"), 8, gpu) == 256
    assert row_alignment(Fp8("hybrid"), 3, gpu) == 192


def test_it_says_what_it_is() -> None:
    assert str(Fp8("hybrid")) == "FP8 hybrid, a scale of a tensor as it is (tensorwise)"
    assert str(Fp8("e4m3", "mxfp8", 1, 2)).endswith("(mxfp8), the first 1 and last 2 layers in bf16")
    assert [recipe for recipe in RECIPES if not Fp8("hybrid", recipe).repeats_itself] == ["delayed"]
