"""Shared-prompt attention in the place of Megatron's core attention.

Each response attends to its prompt, stored once, and to itself. The backends compute the same thing:

- `sdpa`: torch's scaled_dot_product_attention, one call per segment; everywhere, and the reference for the others;
- `varlen`: one FlashAttention call per layer, from the flash-attn package or from torch >= 2.13; GPU, bf16, compute
  capability 8.0 and up;
- `te`: Transformer Engine's DotProductAttention on the same variable-length problem; GPU.

Shapes: T packed tokens, Hq query heads and Hkv key-value heads of this rank, D head size.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.segments import RowParams

# (q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], params) -> [used, Hq * D]: outputs of the row's used tokens,
# padding left out.
Backend = Callable[[Tensor, Tensor, Tensor, RowParams], Tensor]
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: RowParams) -> Tensor:
    """One scaled_dot_product_attention call per segment, at the cost of the segment's own attention pairs."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, T, D]
    gqa = q.size(1) != k.size(1)
    outputs = []
    for segment in params.segments:
        own = slice(segment.own.start, segment.own.stop)
        if segment.prompt is None:
            out = F.scaled_dot_product_attention(
                q[:, :, own], k[:, :, own], v[:, :, own], is_causal=True, enable_gqa=gqa
            )
        else:
            prompt = slice(segment.prompt.start, segment.prompt.stop)
            keys = torch.cat((k[:, :, prompt], k[:, :, own]), dim=2)
            values = torch.cat((v[:, :, prompt], v[:, :, own]), dim=2)
            mask = params.masks[segment.own.length, segment.num_keys]
            out = F.scaled_dot_product_attention(q[:, :, own], keys, values, attn_mask=mask, enable_gqa=gqa)
        outputs.append(out)
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1)


def varlen(kernel: VarlenKernel) -> Backend:
    """A backend of one call to `kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)`, bottom-right causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor, params: RowParams) -> Tensor:
        out = kernel(
            q[: params.row.used_tokens],
            k[params.key_index],
            v[params.key_index],
            *params.cu_seqlens,
            *params.longest,
        )
        return out.flatten(1)

    return attend


def _flash_attn_kernel() -> VarlenKernel:
    from flash_attn import flash_attn_varlen_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)

    return kernel


def _torch_kernel() -> VarlenKernel:
    from torch.nn.attention.varlen import varlen_attn

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        gqa = q.size(1) != k.size(1)
        out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return kernel


def _has_torch_kernel() -> bool:
    """torch >= 2.13: earlier releases of `varlen_attn` have no grouped-query attention."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return version >= (2, 13)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `model.attention_backend`: `auto` takes the fastest that this machine can run.

    Returns:
        `te`, `varlen` or `sdpa`.

    Raises:
        ConfigError: the backend that was asked for cannot run here.
    """
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    flash = flash and torch.cuda.get_device_capability(device) >= (8, 0)
    can = {
        "te": flash and importlib.util.find_spec("transformer_engine") is not None,
        "varlen": flash and (importlib.util.find_spec("flash_attn") is not None or _has_torch_kernel()),
        "sdpa": True,
    }
    if name == "auto":
        return next(backend for backend in ("varlen", "te", "sdpa") if can[backend])
    if not can[name]:
        raise ConfigError(
            f"model.attention_backend={name} needs a GPU of compute capability 8.0 or more, trainer.precision=bf16 and "
            f"{'transformer_engine' if name == 'te' else 'flash-attn or torch >= 2.13'}; "
            "install what is missing or set model.attention_backend=auto"
        )
    return name


def make_backend(name: str, config: TransformerConfig, layer_number: int) -> Backend:
    """The backend of that name for one layer; `name` comes from `choose_backend`."""
    if name == "sdpa":
        return sdpa
    if name == "varlen":
        has_package = importlib.util.find_spec("flash_attn") is not None
        return varlen(_flash_attn_kernel() if has_package else _torch_kernel())
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
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
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
        """[T, 1, Hq * D] from query [T, 1, Hq, D] and key, value [T, 1, Hkv, D]; padding comes out as zeros."""
        tokens, _, heads, size = query.shape
        used = packed_seq_params.row.used_tokens
        if used == 0:
            return query.reshape(tokens, 1, heads * size) * 0
        out = self.attend(query[:, 0], key[:, 0], value[:, 0], packed_seq_params)
        return F.pad(out, (0, 0, 0, tokens - used))[:, None]
