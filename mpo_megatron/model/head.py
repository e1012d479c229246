"""The response head: from hidden states to one summed log-probability per response, never with whole logits.

It stands in the place of Megatron's output layer and runs on the N predicting positions only. Logits exist
for one chunk of positions at a time; the backward pass keeps the log-normaliser of each position (4 bytes)
and computes them again.

Shapes: T packed tokens, N response tokens, R responses, H hidden size, V rows of the vocabulary on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from mpo_megatron.scheduling.pack import PackedRow


class _TokenLogProbs(torch.autograd.Function):
    """log p(target) [N] of a vocabulary-parallel linear layer and softmax, in float32 (float64 for float64 inputs).

    With logits l = W h, log-normaliser Z = logsumexp l: log p = l_target - Z and d log p / d l = onehot - softmax(l).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, group: Any, chunk: int
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        size, rows = targets.numel(), weight.size(0)
        # Log-normaliser over this rank's rows, and the target's logit where this rank holds it.
        partial = hidden.new_full((size,), torch.finfo(dtype).min, dtype=dtype)
        logit = hidden.new_zeros((size,), dtype=dtype)
        here = (targets >= first_row) & (targets < first_row + rows)
        local = torch.where(here, targets - first_row, 0)
        for part in _chunks(size if rows else 0, chunk):
            logits = (hidden[part] @ weight.t()).to(dtype)
            partial[part] = torch.logsumexp(logits, dim=-1)
            logit[part] = logits.gather(1, local[part, None]).squeeze(1) * here[part]
        if dist.get_world_size(group) > 1:
            peak = partial.clone()
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            sums = torch.stack((torch.exp(partial - peak), logit))
            dist.all_reduce(sums, group=group)
            normaliser, logit = sums[0].log() + peak, sums[1]
        else:
            normaliser = partial
        ctx.save_for_backward(hidden, weight, local, here, normaliser)
        ctx.chunk = chunk
        return logit - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, weight, local, here, normaliser = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype)
        for part in _chunks(hidden.size(0) if weight.size(0) else 0, ctx.chunk):
            logits = (hidden[part] @ weight.t()).to(normaliser.dtype)
            # grad * (onehot - softmax), in the place of the logits.
            d_logits = logits.sub_(normaliser[part, None]).exp_().mul_(-grad[part, None])
            d_logits.scatter_add_(1, local[part, None], (grad[part] * here[part])[:, None])
            d_logits = d_logits.to(weight.dtype)
            grad_hidden[part] = d_logits @ weight
            grad_weight += d_logits.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


class ResponseHead(tensor_parallel.ColumnParallelLinear):
    """Megatron's output layer (same weight, same checkpoint name), returning per-response log-probability sums.

    Set `row` before each forward pass. Works with the layer's own weight and with tied embeddings (`weight=`), with and
    without sequence parallelism. Rows of the padded vocabulary take no part in the softmax, so they get no gradient.
    """

    row: PackedRow
    vocab_size: int
    chunk_size: int

    @classmethod
    def take_over(cls, layer: tensor_parallel.ColumnParallelLinear, vocab_size: int, chunk_size: int) -> None:
        """Turn a model's output layer into a response head, in place.

        Args:
            layer: the `output_layer` of a GPTModel.
            vocab_size: the vocabulary without padding.
            chunk_size: positions whose logits exist at a time.
        """
        layer.__class__ = cls
        layer.vocab_size = vocab_size
        layer.chunk_size = chunk_size

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        """Sum the log-probabilities of each response's tokens.

        Args:
            hidden: [T, 1, H], or this rank's part of T under sequence parallelism.
            weight: [V, H] the tied embedding, if the layer has no weight of its own.

        Returns:
            ([R, 1, 1] float32, None): Megatron takes the pair for (logits, bias) and swaps the first two dimensions.
        """
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True
            )
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        row = self.row
        first = dist.get_rank(self.tp_group) * weight.size(0)
        real = max(0, min(weight.size(0), self.vocab_size - first))
        token_logps = _TokenLogProbs.apply(
            hidden[row.predict_from, 0], weight[:real], row.targets, first, self.tp_group, self.chunk_size
        )
        sums = token_logps.new_zeros(row.num_responses).index_add(0, row.target_response, token_logps)
        return sums[:, None, None], None
