"""Rotary embedding at positions in any order, in Megatron's own code and in Transformer Engine's kernel, against
float64.
"""

from typing import Any

import pytest
import torch

from tests.gpu.conftest import Place, on_cpu, on_gpu

TOKENS, HEADS, SIZE, LONGEST = 512, 4, 128, 8192


def deviations(accelerator: str, fused: bool, dtype: torch.dtype) -> tuple[float, float]:
    """Relative, of rotated vectors and of the gradient."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mpo_megatron.model.rotary import PositionRotaryEmbedding
    from mpo_megatron.runtime.device import choose_device
    from mpo_megatron.runtime.parallel import initialize

    device = choose_device(accelerator)
    initialize(device)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randperm(LONGEST, generator=generator)[:TOKENS].to(device)
    frequencies = [500_000.0 ** (-2 * i / SIZE) for i in range(SIZE // 2)]
    angles = PositionRotaryEmbedding(frequencies, device)(positions)
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, apply_rope_fusion=fused
    )
    x, upstream = (torch.randn(2, TOKENS, 1, HEADS, SIZE, generator=generator).to(device, dtype)).unbind()
    x.requires_grad_()
    found = apply_rotary_pos_emb(x, angles, config)
    (gradient,) = torch.autograd.grad(found, x, upstream)

    # Of the angles as float32 has them: what is tested is the rotation, and that a token gets its own.
    exact = x.detach().double().requires_grad_()
    turn = torch.outer(positions.float(), torch.tensor(frequencies, device=device)).double()[:, None, None]
    one, other = exact.chunk(2, -1)
    wanted = torch.cat((one * turn.cos() - other * turn.sin(), other * turn.cos() + one * turn.sin()), -1)
    (expected,) = torch.autograd.grad(wanted, exact, upstream.double())
    return (
        float((found.double() - wanted).norm() / wanted.norm()),
        float((gradient.double() - expected).norm() / expected.norm()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(("place", "fused"), [on_cpu(False), on_gpu(False), on_gpu(True)], indirect=["place"])
def test_each_token_is_turned_by_its_own_position(
    fused: bool, dtype: torch.dtype, place: Place, measured: Any
) -> None:
    if fused:
        place.needs_library("transformer_engine")
    ((forward, backward),) = place.ranks(1).run(deviations, place.accelerator, fused, dtype, timeout=280)
    at_most = 1e-5 if dtype == torch.float32 else 1e-2
    measured("rotated", forward, at_most=at_most)
    measured("gradient", backward, at_most=at_most)
