"""The response head: from hidden states to one summed log-probability per response, never with whole logits.

It stands in the place of Megatron's output layer and runs on the N predicting positions only. Logits exist
for one chunk of positions at a time; the backward pass keeps the log-normaliser of each position (4 bytes)
and computes them again. Under context parallelism each rank predicts from the positions it holds, and the sums are
added up over the ranks.

The logits of a bf16 model are float32, not rounded to bf16: the log-probability of a response of 2048 tokens is within
0.001 nat of what float64 makes of the same hidden states and weight. Sums over tokens, and gradients of hidden states
that several responses share, are added up in an order: as far as the products do, a row gives the same numbers in every
run.

Shapes: t packed tokens on this rank, N response tokens predicted from them, R responses of the row, H hidden size, V
rows of the vocabulary on this rank.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from mpo_megatron.errors import ConfigError
from mpo_megatron.model import logits
from mpo_megatron.model.products import add_product_, full_product
from mpo_megatron.ragged.reads import read
from mpo_megatron.ragged.segments import segment_sum
from mpo_megatron.runtime import capabilities, choices
from mpo_megatron.runtime.facts import Library
from mpo_megatron.scheduling.pack import PackedRow

# Raised where the log-probs of the same model and row become others in the last bit: caches of them hold it.
ARITHMETIC = 3
# What is computed of logits, by `model.head_backend`: modules, of which the second is imported where it can run.
_STEPS = {"eager": "mpo_megatron.model.logits", "triton": "mpo_megatron.model.logits_triton"}


class _TokenLogProbs(torch.autograd.Function):
    """log p(target) [N] of a vocabulary-parallel linear layer and softmax, in float32 (float64 for float64 inputs).

    With logits l = W h, log-normaliser Z = logsumexp l: log p = l_target - Z and d log p / d l = onehot - softmax(l).

    The forward pass goes through the positions in chunks, since the normaliser needs a whole row of logits. The
    backward pass knows it and goes through the vocabulary in blocks instead: each block's part of the weight's
    gradient comes from one product over all positions, in its final place. Either way at most chunk * V logits exist
    at a time; on a CPU fewer, since its cache holds fewer.

    With `into_main_grad` that place is the sum over the step's rows that Megatron's DistributedDataParallel has for the
    weight, and autograd is given a gradient without elements. What else uses the weight, as a tied embedding does,
    adds its own.

    Args (of `apply`):
        hidden: [N, H].
        weight: [V, H], the parameter itself.
        targets: [N] int32, rows of the whole vocabulary.
        first_row: of this rank.
        group: of the ranks that share the vocabulary.
        chunk: positions whose logits exist at a time.
        rows: how many of the V rows are of the vocabulary; the others are padding.
        into_main_grad: where the weight has a `main_grad`.
        steps: `model.logits`, or a module with the same functions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_row: int,
        group: Any,
        chunk: int,
        rows: int,
        into_main_grad: bool,
        steps: ModuleType,
    ) -> Tensor:
        partial, logit = steps.normalise(hidden, weight[:rows], targets, first_row, chunk)
        if dist.get_world_size(group) > 1:
            peak = partial.clone()
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            sums = torch.stack((torch.exp(partial - peak), logit))
            dist.all_reduce(sums, group=group)
            normaliser, logit = sums[0].log() + peak, sums[1]
        else:
            normaliser = partial
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.first_row, ctx.chunk, ctx.rows, ctx.steps = first_row, chunk, rows, steps
        ctx.parameter = weight if into_main_grad and hasattr(weight, "main_grad") else None
        return logit - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        size, rows = targets.numel(), ctx.rows
        grad_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype)
        if ctx.parameter is None:
            grad_weight = weight_sum = torch.empty_like(weight)
            weight_sum[rows if size else 0 :] = 0
        else:
            weight_sum, grad_weight = ctx.parameter.main_grad, _no_elements(weight)
            # For Megatron's hook, which else would add what autograd has been given.
            ctx.parameter.grad_added_to_main_grad = True
        block = _block(ctx.chunk * rows // max(size, 1), logits.at_a_time(hidden, rows))
        for part in logits.chunks(rows if size else 0, block):
            # Nothing of a block is left when the next one's logits are made.
            d_logits = ctx.steps.d_logits_(
                full_product(hidden, weight[part].t()),
                normaliser, targets, grad, ctx.first_row + part.start, weight.dtype,
            )  # fmt: skip
            add_product_(grad_hidden, d_logits, weight[part])
            if ctx.parameter is None:
                torch.mm(d_logits.t(), hidden, out=weight_sum[part])
            else:
                add_product_(weight_sum[part], d_logits.t(), hidden)
            del d_logits
        return grad_hidden.to(hidden.dtype), grad_weight, *[None] * 7


def _no_elements(like: Tensor) -> Tensor:
    """A gradient of that shape that holds nothing and adds nothing. As zeros it would be as large as the weight."""
    indices = torch.empty((like.dim(), 0), dtype=torch.int64, device=like.device)
    return torch.sparse_coo_tensor(indices, like.new_empty(0), like.shape, check_invariants=False)


def _block(wanted: int, most: int) -> int:
    """Rows of the vocabulary at a time: whole 128 bytes of logits, which products of any fewer are slow with."""
    block = min(wanted, most)
    return block // 64 * 64 or max(block, 1)


class _SumOverContext(torch.autograd.Function):
    """Sum over the context-parallel ranks, each of which then computes the same loss: the gradient goes back as it
    is.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class ResponseHead(tensor_parallel.ColumnParallelLinear):
    """Megatron's output layer (same weight, same checkpoint name), returning per-response log-probability sums.

    Set `row` before each forward pass. Works with the layer's own weight and with tied embeddings (`weight=`), with and
    without sequence parallelism. Rows of the padded vocabulary take no part in the softmax, so they get no gradient.
    """

    row: PackedRow
    vocab_size: int
    chunk_size: int
    into_main_grad: bool
    steps: ModuleType

    @classmethod
    def take_over(
        cls,
        layer: tensor_parallel.ColumnParallelLinear,
        vocab_size: int,
        chunk_size: int,
        into_main_grad: bool = True,
        backend: str = "eager",
    ) -> None:
        """Turn a model's output layer into a response head, in place.

        Args:
            layer: the `output_layer` of a GPTModel.
            vocab_size: the vocabulary without padding.
            chunk_size: positions whose logits exist at a time.
            into_main_grad: where Megatron's DistributedDataParallel has a sum of the weight's gradients, add to it.
            backend: what `choose_head` gave.
        """
        layer.__class__ = cls
        layer.into_main_grad = into_main_grad
        layer.vocab_size = vocab_size
        layer.chunk_size = chunk_size
        layer.steps = steps_of(backend)

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        """Sum the log-probabilities of each response's tokens.

        Args:
            hidden: [t, 1, H], or this rank's part of t under sequence parallelism.
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
        predicting = read(hidden.squeeze(1), row.reads)
        token_logps = _TokenLogProbs.apply(
            predicting, weight, row.targets, first, self.tp_group, self.chunk_size, real,
            self.into_main_grad, self.steps,
        )  # fmt: skip
        # In float64, which costs nothing here: a thousand float32 additions would lose what precise logits win.
        sums = segment_sum(token_logps.double(), row.by_response).to(token_logps.dtype)
        if self.config.context_parallel_size > 1:
            sums = _SumOverContext.apply(sums)
        return sums[:, None, None], None


def steps_of(backend: str) -> ModuleType:
    """The module that computes what `choose_head` gave."""
    return importlib.import_module(_STEPS[backend])


def choose_head(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `model.head_backend`: `auto` takes the fastest that this machine can run.

    Returns:
        `triton` or `eager`.

    Raises:
        ConfigError: what was asked for cannot run here.
    """
    if name == "auto":
        return next(backend for backend in choices.HEAD if no_head(backend, device, dtype) is None)
    problem = no_head(name, device, dtype)
    if problem is not None:
        raise ConfigError(f"model.head_backend={name}: {problem}; mend that, or set model.head_backend=eager")
    return name


def no_head(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why what computes the head cannot run; None: it can."""
    on_gpu = device.type == "cuda"
    return choices.head_problem(
        name,
        on_gpu,
        dtype == torch.bfloat16,
        torch.cuda.get_device_capability(device) if on_gpu and torch.cuda.is_available() else (0, 0),
        # Asked for only where it can run: it imports it.
        capabilities.triton() if on_gpu else Library("triton"),
    )
