"""The response head's kernels compiled for the chips that run them, without one: what the compiler makes of them."""

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")

# Bytes of shared memory that one program can have, by compute capability: A100, L40S, H100, B200, RTX 5090.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# The instruction by which its tensor cores multiply.
PRODUCT = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was compiled before is not taken, and nothing is left."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], aligned: set[str], **options: int
) -> Any:  # fmt: skip
    """A kernel for a chip; `aligned` are addresses and numbers that 16 divides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("width", ["whole", "rest"])
@pytest.mark.parametrize("capability", SHARED)
def test_the_forward_kernel_fits_each_chip_and_uses_its_tensor_cores(capability: int, width: str) -> None:
    import triton.language as tl

    from mpo_megatron.model import logits_triton

    blocks = logits_triton.choose_blocks(SHARED[capability], itemsize=2)
    types = dict.fromkeys(("size", "rows", "width", "first_row"), "i32")
    types |= {"hidden": "*bf16", "weight": "*bf16", "targets": "*i32"}
    types |= {"normalisers": "*fp32", "logits_of_targets": "*fp32"}
    constants = {
        "ROWS": logits_triton._ROWS, "SIDE_BY_SIDE": logits_triton._SIDE_BY_SIDE, "BLOCK_N": blocks.n,
        "BLOCK_V": blocks.v, "BLOCK_H": blocks.h, "WHOLE_H": width == "whole", "SUMS": tl.float32,
    }  # fmt: skip
    aligned = {"hidden", "weight", "targets", "normalisers", "logits_of_targets", "width"}
    kernel = compiled(
        logits_triton._normalise, capability, types, constants, aligned,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    assert kernel.metadata.shared <= SHARED[capability]
    assert PRODUCT[capability] in kernel.asm["ptx"]
    # Factors are copied 16 bytes at a time while others are multiplied, and nothing is added up by a lock.
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", kernel.asm["ptx"])
    assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])


@pytest.mark.parametrize("capability", SHARED)
def test_the_backward_kernel_reads_before_it_writes_over(capability: int) -> None:
    """In the memory of float32 logits it writes bf16: all threads have to have read a block before any writes."""
    import triton.language as tl

    from mpo_megatron.model import logits_triton

    types = dict.fromkeys(("rows", "stride", "stride_of_gradient", "first_row"), "i32")
    types |= {
        "logits": "*fp32",
        "gradient": "*bf16",
        "normaliser": "*fp32",
        "targets": "*i32",
        "grad": "*fp32",
    }
    constants = {"COLUMNS": logits_triton._COLUMNS, "TYPE": tl.bfloat16}
    aligned = {"logits", "gradient", "stride", "stride_of_gradient"}
    kernel = compiled(logits_triton._d_logits, capability, types, constants, aligned, num_warps=8)
    lines = re.findall(r"\b(ld\.global|st\.global|bar\.sync|ld\.global\.nc|cp\.async)", kernel.asm["ptx"])
    assert not {"cp.async", "ld.global.nc"} & set(lines)
    order = "".join({"ld.global": "r", "bar.sync": "|", "st.global": "w"}[line] for line in lines)
    assert re.fullmatch(r"[r|]*r\|+w+\|*", order), order
