"""Shared-prompt attention by its definition: dense scores and an explicit mask."""

import torch
from torch import Tensor

from mpo_megatron.model.segments import RowParams


def seen_by(params: RowParams) -> Tensor:
    """[used, used] bool: token t sees token u if u is of its own segment or of its segment's prompt, and not after."""
    row = params.row
    used = sum(span.length for block in row.blocks for span in (block.prompt, *block.responses))
    owner = torch.full((used,), -1)
    prompt_of = torch.full((used,), -1)
    number = 0
    for block in row.blocks:
        prompt = number
        owner[block.prompt.start : block.prompt.stop] = prompt
        for response in block.responses:
            number += 1
            owner[response.start : response.stop] = number
            prompt_of[response.start : response.stop] = prompt
        number += 1
    seen = (owner[:, None] == owner[None]) | (prompt_of[:, None] == owner[None])
    return seen & torch.ones(used, used).tril().bool()


def dense(q: Tensor, k: Tensor, v: Tensor, params: RowParams, scale: float | None = None) -> Tensor:
    """[used, Hq * D] of a whole row, from q [T, Hq, D] and k, v [T, Hkv, D], in their dtype."""
    seen = seen_by(params).to(q.device)
    used, heads, size = seen.size(0), q.size(1), q.size(2)
    k, v = (t[:used].repeat_interleave(heads // t.size(1), 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q[:used], k) * (size**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
