"""Shared-prompt attention in the place of Megatron's core attention.

Each response attends to its prompt, stored once, and to itself. The backends compute the same thing:

- `sdpa`: torch's scaled_dot_product_attention, one call per segment; everywhere, and the reference for the others;
- `varlen`: one FlashAttention call per layer, from the flash-attn package or from torch >= 2.13; GPU, bf16, compute
  capability 8.0 and up;
- `te`: Transformer Engine's DotProductAttention on the same variable-length problem; GPU.

Under context parallelism a rank has the queries of the tokens it holds and gathers the keys and values of the whole row
(with grouped-query attention these are the small part); its segments say which of them each query sees.

For the backward pass a layer keeps its keys and values once, as this rank holds them: neither a prompt's again for each
of its responses nor those of other ranks. What the backend was given is made again from them (`copies`,
`context_keys`).

Shapes: T packed tokens, t of them held by this rank (T without context parallelism), Hq query heads and Hkv key-value
heads of this rank, D head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.context_keys import ContextKeys, gather_row
from mpo_megatron.model.copies import Copies, Make
from mpo_megatron.model.elementwise import rotate
from mpo_megatron.model.half_attention import half_attention, has_half_attention
from mpo_megatron.model.segments import RowParams
from mpo_megatron.ragged.reads import Reads, read
from mpo_megatron.runtime import capabilities, choices
from mpo_megatron.runtime.facts import Library
from mpo_megatron.scheduling.layout import Span

# (q [t, Hq, D], k [T, Hkv, D], v [T, Hkv, D], params) -> [t, Hq * D]: outputs of the held tokens. Those of padding are
# finite and say nothing.
Backend = Callable[[Tensor, Tensor, Tensor, RowParams], Tensor]
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: RowParams, scale: float | None = None) -> Tensor:
    """One scaled_dot_product_attention call per segment, at the cost of the segment's own attention pairs.

    Rows are split once rather than sliced for each segment: the backward pass of a slice fills and adds a whole row.

    Args:
        scale: what scores are multiplied with; None for 1 / sqrt(D), here and in the other backends.
    """
    segments = params.segments
    if not segments:
        # Every parameter keeps a place in the graph, and every rank its part in the collectives of the backward pass.
        return (q * 0 + (k.sum() + v.sum()) * 0).flatten(1)
    copies = Copies()
    kept = copies.keep(k), copies.keep(v)
    gqa, half = q.size(1) != k.size(1), has_half_attention(q, k)
    lengths = [segment.queries.length for segment in segments]
    queries = q.split([*lengths, len(q) - sum(lengths)])
    parts = [_split(t, params.pieces) for t in (k, v)]
    outputs = []
    with copies.not_kept():
        for segment, own in zip(segments, queries, strict=False):
            keys, values = (
                copies.add(_join([pieces[span.start] for span in segment.keys], segment.keys),
                           partial(_slices, whole, segment.keys))
                for pieces, whole in zip(parts, kept, strict=True)
            )  # fmt: skip
            mask = params.mask(segment, q.dtype)
            if half:
                out = half_attention(_heads_first(own), keys, values, mask, scale)
            else:
                out = F.scaled_dot_product_attention(
                    _heads_first(own),
                    keys,
                    values,
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                    enable_gqa=gqa,
                )
            outputs.append(out[0].transpose(0, 1))
    return torch.cat([*outputs, queries[-1] * 0]).flatten(1)


def _heads_first(tensor: Tensor) -> Tensor:
    """[1, heads, tokens, D] of [tokens, heads, D]."""
    return tensor.transpose(0, 1)[None]


def _split(tensor: Tensor, spans: Sequence[Span]) -> dict[int, Tensor]:
    """The parts of [T, heads, D] at spans that follow each other from 0 without gaps, by their starts."""
    lengths = [span.length for span in spans]
    parts = tensor.split([*lengths, len(tensor) - sum(lengths)])
    return {span.start: part for span, part in zip(spans, parts, strict=False)}


def _join(parts: Sequence[Tensor], spans: Sequence[Span]) -> Tensor:
    """[1, heads, keys, D]: the parts [.., heads, D], cut to the spans' lengths, one after the other."""
    # Under context parallelism a segment may end within its response.
    cut = [p if len(p) == s.length else p[: s.length] for p, s in zip(parts, spans, strict=True)]
    return _heads_first(cut[0] if len(cut) == 1 else torch.cat(cut))


def _slices(whole: Make, spans: Sequence[Span]) -> Tensor:
    """What `_join` made of the whole [T, heads, D]."""
    tensor = whole()
    return _join([tensor[span.start : span.stop] for span in spans], spans)


def varlen(kernel: VarlenKernel) -> Backend:
    """A backend of one call to `kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)`, bottom-right causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor, params: RowParams) -> Tensor:
        index, copies = params.row.attention, Copies()
        keys, values = (
            copies.add(read(t, index.keys), partial(_read_again, copies.keep(t), index.keys)) for t in (k, v)
        )
        with copies.not_kept():
            out = kernel(q, keys, values, index.cu_queries, index.cu_keys, *index.longest)
        return out.flatten(1)

    return attend


def _read_again(whole: Make, reads: Reads) -> Tensor:
    return read(whole(), reads)


def _flash_attn_kernel(scale: float | None) -> VarlenKernel:
    from flash_attn import flash_attn_varlen_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True)

    return kernel


def _torch_kernel(scale: float | None) -> VarlenKernel:
    from torch.nn.attention.varlen import varlen_attn

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        gqa = q.size(1) != k.size(1)
        out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return kernel


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `model.attention_backend`: `auto` takes the fastest that this machine can run.

    Returns:
        `te`, `varlen` or `sdpa`.

    Raises:
        ConfigError: the backend that was asked for cannot run here.
    """
    if name == "auto":
        return next(backend for backend in choices.ATTENTION if no_backend(backend, device, dtype) is None)
    problem = no_backend(name, device, dtype)
    if problem is not None:
        raise ConfigError(
            f"model.attention_backend={name}: {problem}; mend that, or set model.attention_backend=auto"
        )
    return name


def no_backend(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run; None: it can."""
    on_gpu = device.type == "cuda"
    return choices.attention_problem(
        name,
        on_gpu,
        dtype in (torch.bfloat16, torch.float16),
        torch.cuda.get_device_capability(device) if on_gpu and torch.cuda.is_available() else (0, 0),
        # Asked for only where they can run: it imports them.
        [] if not on_gpu else [capabilities.transformer_engine()] if name == "te" else varlen_libraries(),
    )


def varlen_libraries() -> list[Library]:
    """Those that have a kernel for `varlen`; the first that can be used is."""
    return [capabilities.flash_attention(), capabilities.torch_varlen_attention()]


def make_backend(name: str, config: TransformerConfig, layer_number: int) -> Backend:
    """The backend of that name for one layer; `name` comes from `choose_backend`, the scale of scores from `config`."""
    scale = config.softmax_scale
    if name == "sdpa":
        return partial(sdpa, scale=scale)
    if name == "varlen":
        has_package = capabilities.flash_attention().problem is None
        return varlen((_flash_attn_kernel if has_package else _torch_kernel)(scale))
    assert name == "te", name
    return varlen(_te_kernel(config, layer_number))


def _te_kernel(config: TransformerConfig, layer_number: int) -> VarlenKernel:
    import transformer_engine.pytorch as te

    tp = config.tensor_model_parallel_size
    attention = te.DotProductAttention(
        num_attention_heads=config.num_attention_heads // tp,
        kv_channels=config.kv_channels,
        num_gqa_groups=config.num_query_groups // tp,
        attention_dropout=0.0,
        softmax_scale=config.softmax_scale,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        # Queries and keys have lengths of their own; for self-attention its unfused path takes the queries' for both.
        attention_type="cross",
        layer_number=layer_number,
    )

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        out = attention(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_kv=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_kv=max_k,
        )
        return out.reshape(q.shape)

    return kernel


def use_shared_prompts(spec: ModuleSpec, backend: str) -> ModuleSpec:
    """Put shared-prompt attention into a transformer layer's spec, in place, and return it.

    Args:
        spec: a layer with self-attention, from Transformer Engine or local.
        backend: what `choose_backend` gave.
    """
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=SharedPromptAttention, params={"backend": backend}
    )
    return spec


class SharedPromptAttention(MegatronModule):
    """Megatron's core-attention module for packed rows. No parameters, no dropout."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *args: Any, backend: str = "sdpa", **kwargs: Any
    ) -> None:
        super().__init__(config)
        self.attend = make_backend(backend, config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: RowParams,
        **kwargs: Any,
    ) -> Tensor:
        """[t, 1, Hq * D] from query [t, 1, Hq, D] and key, value [t, 1, Hkv, D]; that of padding says nothing."""
        params = packed_seq_params
        queries, keys, values = query[:, 0], key[:, 0], value[:, 0]
        if (turn := params.turn(queries.dtype)) is not None:
            queries, keys = rotate(queries, *turn), rotate(keys, *turn)
        if self.config.context_parallel_size == 1:
            # Values are a view of a product that has queries and keys in it, too; kept as such they would keep it all.
            return self.attend(queries, keys, values.contiguous(), params)[:, None]
        group = parallel_state.get_context_parallel_group()
        if self.config.recompute_granularity is not None or not torch.is_grad_enabled():
            # What is computed again keeps nothing for long.
            keys, values = gather_row(keys, values, params.row.row_tokens, group)
            return self.attend(queries, keys, values, params)[:, None]
        context = ContextKeys(params.row.row_tokens, group)
        keys, values = context.gather(keys, values)
        with context.not_kept():
            out = self.attend(queries, keys, values, params)
        return context.before_backward(out)[:, None]
