"""Attention backends against dense softmax attention with an explicit mask, forward and backward."""

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.data import TokenizedGroup
from mpo_megatron.errors import ConfigError
from mpo_megatron.model import attention
from mpo_megatron.model.attention import Backend, choose_backend, make_backend, sdpa, varlen
from mpo_megatron.model.copies import Copies
from mpo_megatron.model.segments import RowParams
from mpo_megatron.scheduling.pack import pack_row
from tests.helpers import flash
from tests.helpers.attention import dense
from tests.helpers.models import make_groups
from tests.helpers.saved import saved_bytes

HEADS, KV_HEADS, SIZE = 6, 2, 8


TOKENS = 320


def params(shared_prompt: bool = True, context: tuple[int, int] = (1, 0)) -> RowParams:
    groups = make_groups([3, 2, 5], 50)
    ids = [range(3), range(3, 5), range(5, 10)]
    return RowParams(pack_row(groups, ids, row_tokens=TOKENS, shared_prompt=shared_prompt, context=context))


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, HEADS, SIZE), (tokens, KV_HEADS, SIZE), (tokens, KV_HEADS, SIZE))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)  # type: ignore[return-value]


def per_segment_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What FlashAttention's variable-length kernel computes, bottom-right causal, in plain torch."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == q.size(0)
    assert cu_k[-1] == k.size(0)
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        keys, values = (t[k0:k1].repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) / SIZE**0.5
        mask = torch.ones(q1 - q0, k1 - k0).tril(int((k1 - k0) - (q1 - q0))).bool()
        outputs.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)
        )
    return torch.cat(outputs)


BACKENDS = pytest.mark.parametrize("backend", [sdpa, varlen(per_segment_kernel)], ids=["sdpa", "varlen"])


@BACKENDS
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_backends_compute_the_definition(backend: Backend, shared_prompt: bool) -> None:
    row = params(shared_prompt)
    ours, theirs = inputs(TOKENS), inputs(TOKENS)
    out, wanted = backend(*ours, row)[: row.row.used_tokens], dense(*theirs, row)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(wanted)
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
        assert a.grad is not None
        assert a.grad.abs().sum() > 0


def test_scores_are_scaled_as_the_config_says() -> None:
    q, k, v = inputs(TOKENS)
    for scale in (None, 0.3):
        config = TransformerConfig(
            num_layers=1, hidden_size=SIZE * HEADS, num_attention_heads=HEADS, softmax_scale=scale
        )
        out = make_backend("sdpa", config, 1)(q, k, v, params())[: params().row.used_tokens]
        wanted = dense(q if scale is None else q * scale * SIZE**0.5, k, v, params())
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)


def test_bf16_on_cpus_has_torchs_outputs_and_closer_gradients() -> None:
    row = params()
    rounded = [tensor.detach().bfloat16() for tensor in inputs(TOKENS)]
    exact, ours, torchs = (
        [tensor.to(dtype, copy=True).requires_grad_() for tensor in rounded]
        for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    )
    weights = torch.randn(row.row.used_tokens, HEADS * SIZE).bfloat16()
    outputs = []
    for (q, k, v), is_ours in ((exact, False), (ours, True), (torchs, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "has_half_attention", lambda *_, is_ours=is_ours: is_ours)
            out = sdpa(q, k, v, row)[: row.row.used_tokens]
        (out * weights.to(out.dtype)).sum().backward()
        outputs.append(out.detach())
    assert torch.equal(outputs[1], outputs[2])
    with torch.no_grad():
        assert torch.equal(sdpa(ours[0], ours[1], ours[2], row)[: row.row.used_tokens], outputs[1])
    for best, mine, other in zip(exact, ours, torchs, strict=True):
        assert best.grad is not None
        errors = [
            float((side.grad.double() - best.grad).norm() / best.grad.norm())
            for side in (mine, other)
            if side.grad is not None
        ]
        assert errors[0] < 4e-3
        assert errors[0] < 1.1 * errors[1]


@BACKENDS
@pytest.mark.parametrize("size", [2, 4, 5])
def test_context_parallel_ranks_compute_their_parts(backend: Backend, size: int) -> None:
    """Each rank's queries against the keys of the whole row give the whole row's outputs, cut as the row is."""
    q, k, v = inputs(TOKENS)
    whole = sdpa(q, k, v, params())[: params().row.used_tokens]
    places = []
    for rank in range(size):
        row = params(context=(size, rank))
        mine = torch.cat([torch.arange(span.start, span.stop) for span in row.row.held])
        out = backend(q[mine], k, v, row)
        used = mine[: row.row.used_tokens]
        torch.testing.assert_close(out[: len(used)], whole[used], rtol=1e-10, atol=1e-12)
        places.append(used)
    assert torch.cat(places).sort().values.tolist() == list(range(len(whole)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("responses", [4, 16])
@pytest.mark.parametrize("name", ["sdpa", "varlen"])
def test_keys_are_kept_once(name: str, responses: int, dtype: torch.dtype) -> None:
    """However many responses read a prompt's: queries, keys and values, outputs, normalisers, and masks of sdpa."""
    backend = sdpa if name == "sdpa" else varlen(flash.kernel)
    length = 64
    tokens = length * (responses + 1)
    ids = np.arange(length)
    scores = np.arange(float(responses))
    group = TokenizedGroup("a", ids, [ids] * responses, scores, scores > scores.mean())
    row = RowParams(pack_row([group], [range(responses)], row_tokens=tokens, shared_prompt=True))
    q, k, v = (tensor.to(dtype) for tensor in inputs(tokens))
    with saved_bytes([row.row.tokens]) as counter:
        out = backend(q * 1, k * 1, v * 1, row)
    inputs_and_output = tokens * SIZE * (2 * HEADS + 2 * KV_HEADS) * dtype.itemsize
    mask = 2 * length * length * dtype.itemsize if name == "sdpa" else 0
    assert inputs_and_output < counter.peak <= inputs_and_output + tokens * HEADS * 8 + mask
    out.sum().backward()
    assert counter.live == 0


def test_a_copy_inside_a_copy_is_made_again_from_what_is_kept() -> None:
    """Of three sizes of the same thing only the smallest is kept, by hooks that were there before."""
    source = torch.randn(3, dtype=torch.float64, requires_grad=True)
    small = source * 1
    with saved_bytes([source]) as counter:
        outer = Copies()
        kept = outer.keep(small)
        middle = outer.add(small.repeat(2), lambda: kept().repeat(2))
        with outer.not_kept():
            inner = Copies()
            whole = inner.keep(middle)
            large = inner.add(middle.repeat(5), lambda: whole().repeat(5))
            with inner.not_kept():
                out = large.exp() * large
    # The exponentials, once, and the three numbers.
    assert counter.peak == 30 * 8 + 3 * 8
    out.sum().backward()
    wanted = 10 * (source.exp() * (1 + source)).detach()
    torch.testing.assert_close(source.grad, wanted, rtol=1e-12, atol=1e-12)


def test_the_choice_on_a_cpu_is_sdpa_and_others_are_refused() -> None:
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.bfloat16) == "sdpa"
    for name in ("varlen", "te"):
        with pytest.raises(ConfigError, match=f"attention_backend={name}: it needs a GPU"):
            choose_backend(name, cpu, torch.bfloat16)
