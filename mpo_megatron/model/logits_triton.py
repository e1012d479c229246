"""What the response head computes of logits on a GPU, in two kernels of Triton; the same as `model.logits` does.

Forward, one kernel: a program takes BLOCK_N positions and goes through some rows of the vocabulary in blocks. The
product of a block stays in registers, in float32; a running maximum and a sum of exponentials go on from block to
block, and where a block has a position's target, its logit is written. Each program writes one log-normaliser of its
rows, and they are put together in the order of the vocabulary: no lock, no atomic addition, so a row gives the same
bits in every run. How many rows a program takes is fixed, so a position's log-prob does not depend on how many others
there are; and few positions still make programs enough.

Backward: logits come from torch's product, one kernel turns them into their gradient, and two of torch's products make
the gradients of hidden states and weight of it, the second added to `main_grad`. That kernel reads four bytes and
writes two for each logit, and the two lie where the first two of the four were: of a block's logits there is one copy.
A product in Triton that ends in this kernel would save a write and a read, which at a hidden size of 4096 is 15% of a
product on an H100; Triton's own product is slower than cuBLAS by as much or more, and by more on newer chips. (In the
forward pass it pays: there nothing at all would have to be written.)

The blocks are chosen by a rule, not by timing them at the start of a run: runs that chose otherwise would round
otherwise, and cached log-probs of the reference would no longer be those of the run.

Others' kernels, as read in 2026-11:

- Liger's fused linear cross-entropy (0.8.5, BSD): logits in bf16 are written by chunk of positions; no ranks that share
  a vocabulary; gradients are made in the forward pass, the weight's as a tensor of its own (for losses per token, in a
  second forward pass), so a forward pass for log-probs alone and `main_grad` do not fit; it waits for the host. Its
  vocabulary-parallel kernels start from whole logits and keep float32 exponentials of all of them for backward.
- Apple's cut cross-entropy (its own licence): a forward kernel much like this one, whose programs add to one
  log-normaliser under a lock, so in any order; a backward pass in Triton altogether, which leaves out small gradients
  and adds the others up under locks. Blocks are timed at the start.
- Megatron-core (0.16 to 0.19): its fused cross-entropy starts from whole logits.

Shapes as in `model.head`.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of the vocabulary that one program goes through.
_ROWS = 2048
# Blocks of positions that run side by side, so that they read the same weights from the cache.
_SIDE_BY_SIDE = 16
# Logits that a program of the backward pass has at a time.
_COLUMNS = 2048


@dataclass(frozen=True)
class Blocks:
    """What a program of the forward pass multiplies at a time: `n` positions, `v` words, `h` of the hidden size.

    Attributes:
        warps, stages: of the program, and how many factors are on their way to it.
    """

    n: int
    v: int
    h: int
    warps: int
    stages: int

    def shared_memory(self, itemsize: int) -> int:
        """Bytes: the factors that are on their way."""
        return (self.n + self.v) * self.h * itemsize * self.stages


# The largest that fits is taken. Sums: n * v float32 in the registers, at most 128 a thread.
BLOCKS = (Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 64, 8, 2), Blocks(64, 64, 32, 4, 2))
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}


def choose_blocks(shared_memory: int, itemsize: int) -> Blocks:
    """The blocks for a chip with so many bytes of shared memory for a program, and factors of `itemsize` bytes."""
    return next((blocks for blocks in BLOCKS if blocks.shared_memory(itemsize) <= shared_memory), BLOCKS[-1])


def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have; of Triton's interpreter on a CPU none."""
    if device.type != "cuda":
        return 0
    return _max_shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _max_shared_memory(index: int) -> int:
    # torch before 2.7 does not tell.
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def normalise(
    hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, chunk: int, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """As `model.logits.normalise`. No logits are written, so `chunk` says nothing here.

    Args:
        blocks: those for the GPU; None: chosen.
    """
    (size, width), rows = hidden.shape, weight.size(0)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logit = hidden.new_zeros((size,), dtype=dtype)
    if not size or not rows:
        return hidden.new_full((size,), torch.finfo(dtype).min, dtype=dtype), logit
    blocks = blocks or choose_blocks(_shared_memory(hidden.device), hidden.itemsize)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    parts = triton.cdiv(rows, _ROWS)
    normalisers = hidden.new_empty((parts, size), dtype=dtype)
    _normalise[(triton.cdiv(size, blocks.n) * parts,)](
        hidden, weight, targets, normalisers, logit, size, rows, width, first_row,
        ROWS=_ROWS, SIDE_BY_SIDE=_SIDE_BY_SIDE, BLOCK_N=blocks.n, BLOCK_V=blocks.v, BLOCK_H=blocks.h,
        WHOLE_H=width % blocks.h == 0, SUMS=_TYPES[dtype], num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return normalisers.logsumexp(0), logit


def d_logits_(
    logits: Tensor, normaliser: Tensor, targets: Tensor, grad: Tensor, first_row: int, dtype: torch.dtype
) -> Tensor:
    """As `model.logits.d_logits_`; what is returned lies in the memory of `logits`."""
    size, rows = logits.shape
    gradient = logits.view(dtype)[:, :rows]
    if size:
        _d_logits[(size,)](
            logits, gradient, normaliser, targets, grad.contiguous(), rows, logits.stride(0), gradient.stride(0),
            first_row, COLUMNS=_COLUMNS, TYPE=_TYPES[dtype], num_warps=8,
        )  # fmt: skip
    return gradient


@triton.jit(do_not_specialize=["size", "first_row"])
def _normalise(
    hidden, weight, targets, normalisers, logits_of_targets, size, rows, width, first_row,
    ROWS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, WHOLE_H: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of one block of positions and ROWS rows of the vocabulary: normalisers [parts, N], logits_of_targets [N]."""
    # Some blocks of positions with all parts of the vocabulary, then the next blocks.
    program, parts = tl.program_id(0), tl.cdiv(rows, ROWS)
    before = program // (SIDE_BY_SIDE * parts) * SIDE_BY_SIDE
    beside = tl.minimum(tl.cdiv(size, BLOCK_N) - before, SIDE_BY_SIDE)
    within = program - before * parts
    part = within // beside

    position = (before + within % beside) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = position < size
    target = tl.load(targets + position, mask=held, other=-1).to(tl.int32) - first_row
    depth = tl.arange(0, BLOCK_H)
    left = hidden + position.to(tl.int64)[:, None] * width + depth[None, :]

    peak = tl.full((BLOCK_N,), float("-inf"), SUMS)
    total = tl.zeros((BLOCK_N,), SUMS)
    for start in range(part * ROWS, tl.minimum(part * ROWS + ROWS, rows), BLOCK_V):
        row = start + tl.arange(0, BLOCK_V)
        real = row < rows
        right = weight + row.to(tl.int64)[None, :] * width + depth[:, None]
        logits = tl.zeros((BLOCK_N, BLOCK_V), SUMS)
        for done in range(0, width, BLOCK_H):
            if WHOLE_H:
                a = tl.load(left + done, mask=held[:, None], other=0.0)
                b = tl.load(right + done, mask=real[None, :], other=0.0)
            else:
                a = tl.load(left + done, mask=held[:, None] & (done + depth < width)[None, :], other=0.0)
                b = tl.load(right + done, mask=real[None, :] & (done + depth < width)[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision="ieee", out_dtype=SUMS)
        is_target = (row[None, :] == target[:, None]) & real[None, :]
        has_target = held & (target >= start) & (target < tl.minimum(start + BLOCK_V, rows))
        tl.store(logits_of_targets + position, tl.sum(tl.where(is_target, logits, 0.0), 1), mask=has_target)
        logits = tl.where(real[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        peak = higher
    tl.store(normalisers + part.to(tl.int64) * size + position, peak + tl.log(total), mask=held)


@triton.jit(do_not_specialize=["first_row"])
def _d_logits(
    logits, gradient, normaliser, targets, grad, rows, stride, stride_of_gradient, first_row,
    COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of one position: gradient = grad * (onehot(target) - exp(logits - normaliser)), in the memory of `logits`."""
    position = tl.program_id(0).to(tl.int64)
    peak, scale = tl.load(normaliser + position), tl.load(grad + position)
    target = tl.load(targets + position).to(tl.int32) - first_row
    for start in range(0, rows, COLUMNS):
        row = start + tl.arange(0, COLUMNS)
        value = tl.load(logits + position * stride + row, mask=row < rows)
        value = -scale * tl.exp(value - peak)
        value = tl.where(row == target, value + scale, value)
        # What is narrower lies over logits of this block or of those before: all threads must have read this one.
        tl.debug_barrier()
        tl.store(gradient + position * stride_of_gradient + row, value.to(TYPE), mask=row < rows)
