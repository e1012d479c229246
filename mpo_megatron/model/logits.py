"""What the response head computes of logits, in torch's operations; `model.logits_triton` does the same on a GPU.

Shapes as in `model.head`; `rows` of the vocabulary, of which the first is `first_row` of the whole.
"""

from itertools import product

import torch
from torch import Tensor

from mpo_megatron.model.products import full_product

# Rows of the vocabulary whose logits exist at a time on a CPU: they go through several passes, which its cache holds.
_CPU_COLUMNS = 2048


def normalise(
    hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The log-normaliser over these rows, and the target's logit where it is one of them.

    Args:
        hidden: [N, H].
        weight: [rows, H].
        targets: [N] rows of the whole vocabulary.
        chunk: positions whose logits exist at a time.

    Returns:
        ([N], [N]) in float32 (float64 for float64 inputs): without rows the least number, not -inf, whose difference
        from itself is no number; and 0 where the target is none of the rows.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    size, rows = targets.numel(), weight.size(0)
    partial = hidden.new_full((size,), torch.finfo(dtype).min, dtype=dtype)
    logit = hidden.new_zeros((size,), dtype=dtype)
    for part, columns in product(chunks(size, chunk), chunks(rows, at_a_time(hidden, rows))):
        logits = full_product(hidden[part], weight[columns].t())
        local, here = _local_targets(targets[part], first_row + columns.start, logits.size(1))
        logit[part] += logits.gather(1, local).squeeze(1) * here
        # logsumexp in the place of the logits: no second tensor of their size.
        peak = logits.amax(dim=-1, keepdim=True)
        of_columns = logits.sub_(peak).exp_().sum(-1).log_().add_(peak.squeeze(1))
        partial[part] = torch.logaddexp(partial[part], of_columns)
    return partial, logit


def d_logits_(
    logits: Tensor, normaliser: Tensor, targets: Tensor, grad: Tensor, first_row: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of logits, which are lost: grad * (onehot(target) - exp(logits - normaliser)).

    Args:
        logits: [N, rows], contiguous.
        normaliser, targets, grad: [N].
        dtype: of the result [N, rows].
    """
    gradient = logits.sub_(normaliser[:, None]).exp_().mul_(-grad[:, None])
    local, here = _local_targets(targets, first_row, logits.size(1))
    # One target a row: what is read, changed and written back needs no atomic addition.
    gradient.scatter_(1, local, gradient.gather(1, local) + (grad * here)[:, None])
    return gradient.to(dtype)


def _local_targets(targets: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """([N, 1] int64 row of each target among `rows` rows from `first_row`, 0 where outside; [N] bool, inside)."""
    local = targets.long() - first_row
    here = (local >= 0) & (local < rows)
    return local.masked_fill(~here, 0)[:, None], here


def at_a_time(hidden: Tensor, rows: int) -> int:
    """At most how many of the `rows` of the vocabulary have logits at a time."""
    return _CPU_COLUMNS if hidden.device.type == "cpu" else max(rows, 1)


def chunks(size: int, chunk: int) -> list[slice]:
    """`size` in slices of `chunk`."""
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
