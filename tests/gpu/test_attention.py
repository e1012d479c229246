"""Every attention backend against dense attention in float64, forward and backward, from the same 16-bit numbers."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.gpu.conftest import Place, on_cpu, on_gpu

HEADS = 8
# Of bf16: an output is rounded by up to 2^-9 of it, and kernels round weights of attention, or their gradients, before
# the second product. A wrong mask or position is off by tenths.
AT_MOST = 1e-2


def deviations(accelerator: str, backend: str, size: int, padding: str, longest: int) -> dict[str, float]:
    """Largest relative deviation (of norms) of output and gradients, over prompts shared and repeated, heads of keys
    as many as of queries and fewer, and two scales of scores.

    Args:
        padding: `none`, `some`, or `all` for a row of padding, whose gradients are 0. Outputs of padding are finite.
        longest: above the tokens of the longest prompt or response.
    """
    from mpo_megatron.runtime.device import choose_device
    from mpo_megatron.runtime.parallel import initialize

    device = choose_device(accelerator)
    initialize(device)
    worst: dict[str, float] = {}
    for shared, kv_heads, scale in product((True, False), (2, HEADS), (None, 0.2)):
        found = _deviations(device, backend, size, padding, longest, shared, kv_heads, scale)
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
    return worst


def _deviations(
    device: torch.device,
    backend: str,
    size: int,
    padding: str,
    longest: int,
    shared_prompt: bool,
    kv_heads: int,
    scale: float | None,
) -> dict[str, float]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mpo_megatron.model.attention import SharedPromptAttention
    from mpo_megatron.model.segments import RowParams
    from mpo_megatron.scheduling.layout import GroupLengths, lay_out
    from mpo_megatron.scheduling.pack import pack_row
    from tests.helpers.attention import dense
    from tests.helpers.models import make_groups

    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * size, num_attention_heads=HEADS, num_query_groups=kv_heads,
        kv_channels=size, softmax_scale=scale,
    )  # fmt: skip
    groups = [] if padding == "all" else make_groups([4, 3, 1], 50, longest=longest)
    lengths = [GroupLengths(len(g.prompt_ids), tuple(map(len, g.response_ids))) for g in groups]
    used = max((r.stop for block in lay_out(lengths, shared_prompt) for r in block.responses), default=0)
    tokens = used + {"none": 0, "some": 37, "all": 128}[padding]
    numbers = [range(4), range(4, 7), range(7, 8)][: len(groups)]
    row = pack_row(groups, numbers, row_tokens=tokens, shared_prompt=shared_prompt, device=device)
    params = RowParams(row)

    generator = torch.Generator(device).manual_seed(0)
    shapes = [(tokens, 1, heads, size) for heads in (HEADS, kv_heads, kv_heads)]
    mine = [torch.randn(s, generator=generator, device=device).bfloat16().requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in mine]
    out = SharedPromptAttention(config, 1, backend=backend)(*mine, packed_seq_params=params)
    assert out.shape == (tokens, 1, HEADS * size)
    assert bool(out.isfinite().all())
    upstream = torch.randn(out.shape, generator=generator, device=device).bfloat16()
    upstream[used:] = 0
    gradients = torch.autograd.grad(out, mine, upstream)
    if padding == "all":
        return {"gradients": max(float(gradient.abs().max()) for gradient in gradients)}
    q, k, v = (t[:, 0] for t in exact)
    wanted = dense(q, k, v, params, scale)
    expected = torch.autograd.grad(wanted, exact, upstream[:used, 0].double())
    names = ("output", "d queries", "d keys", "d values")
    pairs = zip((out[:used, 0], *gradients), (wanted, *expected), strict=True)
    return {
        name: float((found.double() - right).norm() / right.norm())
        for name, (found, right) in zip(names, pairs, strict=True)
    }


@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("place", "backend"),
    [on_cpu("sdpa"), *(on_gpu(backend) for backend in ("varlen", "te", "sdpa"))],
    indirect=["place"],
)
def test_backend_computes_the_definition(
    backend: str, size: int, padding: str, place: Place, measured: Any
) -> None:
    place.needs_attention(backend)
    longest = 700 if place.is_gpu else 40
    (found,) = place.ranks(1).run(deviations, place.accelerator, backend, size, padding, longest, timeout=280)
    for what, deviation in found.items():
        measured(what, deviation, at_most=0.0 if padding == "all" else AT_MOST)
