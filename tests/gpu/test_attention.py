"""FlashAttention and Transformer Engine backends against sdpa, on a GPU: pytest -m gpu tests/gpu."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.attention import choose_backend, make_backend
from mpo_megatron.model.segments import RowParams
from mpo_megatron.scheduling.pack import pack_row
from tests.helpers.models import make_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine"),
]
HEADS, KV_HEADS, SIZE = 8, 2, 64


@pytest.mark.parametrize("name", ["varlen", "te"])
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_backend_agrees_with_sdpa(name: str, shared_prompt: bool) -> None:
    device = torch.device("cuda")
    try:
        choose_backend(name, device, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=SIZE,
        softmax_scale=0.2,  # unlike the default, as with yarn
    )
    groups = make_groups([4, 3, 5], 50, longest=200)
    ids = [range(4), range(4, 7), range(7, 12)]
    row = pack_row(groups, ids, row_tokens=4096, shared_prompt=shared_prompt, device=device)
    params = RowParams(row)
    results = []
    for backend in (make_backend("sdpa", config, 1), make_backend(name, config, 1)):
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((4096, HEADS, SIZE), (4096, KV_HEADS, SIZE), (4096, KV_HEADS, SIZE))
        q, k, v = (
            torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16, requires_grad=True)
            for s in shapes
        )
        out = backend(q, k, v, params)
        out.float().square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)
