"""float32 master weights that begin where the starting weights are, not on the grid of their bf16 copies.

Megatron makes the masters from the bf16 weights, so each begins exactly on the bf16 grid. At the learning rates of
preference training an update is smaller than half the distance to the next bf16 value: the optimizer moves the masters,
and the forward pass sees nothing until their moves add up to half a unit in the last place.

Here a master takes the value that the Hugging Face folder holds, if that is finer than bf16; and within the rounding of
that value, as wide as the type that it comes in (nothing of float32, an eighth of a bf16 unit for float16, a whole unit
for bf16), it is drawn uniformly. The bf16 weights are the same to the last bit; and an update of k hundredths of a unit
then moves k of a hundred weights, from the first step on.

The draw is a function of the seed, the parameter's name and the element's place in the whole parameter, so that masters
do not depend on the layout. A checkpoint holds the masters: a run that resumes draws nothing.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mpo_megatron.conversion.hf_folder import WeightReader, is_checkpoint
from mpo_megatron.conversion.load import global_parameter_names, hf_values
from mpo_megatron.conversion.names import Entry, by_megatron_name, entries
from mpo_megatron.conversion.precision import BF16, significant_bits
from mpo_megatron.conversion.transforms import COLUMNS, Cut
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.objectives.splitmix import shift_right, splitmix64
from mpo_megatron.runtime.parallel import ParallelLayout, raising_together

_CHUNK = 2**22  # elements that are drawn at a time
_FLOAT32_BITS = 24


def dither(values: Tensor, uniform: Tensor, significant: int = BF16) -> Tensor:
    """float32 numbers drawn within the rounding of the given ones, which round to the same bf16 numbers as these.

    A number of `significant` bits has the lower 24 - significant bits of the same float32 number at zero. Adding k to
    the float32 number's bits, |k| < 2**(23 - significant), goes k float32 steps away from zero, or towards it, and
    never as far as the middle between two numbers of so many bits. Below a power of two the steps are half as long, and
    so is that side of the cell: it is drawn half as often as the upper one. A float16 number may lie in the middle
    between two bf16 ones; a draw on the side that rounds to the other one is mirrored. Zeros, infinities and NaN stay
    as they are.

    Args:
        values: any shape; bf16, or float32 numbers of at most `significant` bits.
        uniform: float64 of the same shape, in [0, 1).
        significant: bits, the leading one included: 8 for bf16, 11 for float16, 24 for float32 (which leaves them).
    """
    plain = values.float()
    if significant == _FLOAT32_BITS:
        return plain
    bits = plain.view(torch.int32)
    upper = torch.where((bits & 0x7FFFFF) == 0, 2 / 3, 1 / 2)
    outwards = uniform < upper
    # Where in its side of the cell: [0, 1).
    place = torch.where(outwards, uniform / upper, (uniform - upper) / (1 - upper))
    half = 1 << (_FLOAT32_BITS - 1 - significant)  # float32 steps from a number to the end of its cell
    steps = (place * half).to(torch.int32).clamp_(max=half - 1)
    steps = torch.where(outwards, steps, -steps)
    dithered = (bits + steps).view(torch.float32)
    if significant > BF16:
        mirrored = dithered.bfloat16() != plain.bfloat16()
        dithered = torch.where(mirrored, (bits - steps).view(torch.float32), dithered)
    return torch.where(plain.isfinite() & (plain != 0), dithered, plain)


def uniform_numbers(seed: int, name: str, places: Tensor) -> Tensor:
    """float64 in [0, 1), a function of seed, name and place alone.

    Args:
        places: int64.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    return shift_right(splitmix64(places, key), 11).double() * 2.0**-53


def _lines(entry: Entry, architecture: Architecture, cut: Cut) -> tuple[Tensor, Tensor, int]:
    """Where a rank's shard of a parameter lies in the whole.

    Returns:
        (numbers of its rows, numbers of its columns, columns of the whole). The rows of all Hugging Face tensors behind
        the parameter are numbered one after another, from 1; 0 is the vocabulary's padding.
    """
    shapes = list(entry.shapes(architecture).values())
    width = shapes[0][1] if len(shapes[0]) > 1 else 1
    if entry.kind is COLUMNS:
        numbers = torch.arange(width)[None]
        return torch.arange(1, shapes[0][0] + 1), entry.kind.cut([numbers], cut)[0], width
    ends = list(accumulate((shape[0] for shape in shapes), initial=1))
    sources = [
        torch.arange(start, stop).reshape(-1, *(1 for _ in shape[1:]))
        for shape, (start, stop) in zip(shapes, pairwise(ends), strict=True)
    ]
    return entry.kind.cut(sources, cut).flatten(), torch.arange(width), width


def place_masters(
    models: Sequence[GroupModel],
    optimizer: Any,
    architecture: Architecture,
    layout: ParallelLayout,
    source: str | Path,
    seed: int,
) -> None:
    """Set the masters of this rank's bf16 parameters; all ranks call it, once, before the first step.

    Args:
        models: unwrapped model chunks, filled with the starting weights.
        optimizer: Megatron's, with the masters of these models as it has made them.
        source: what the weights come from: a Hugging Face folder, or a Megatron checkpoint, which is taken as bf16.
        seed: of the draw.

    Raises:
        CheckpointError: the folder cannot be read; on all ranks.
    """
    table = by_megatron_name(architecture)
    finer = _finer_than_bf16(source, architecture, layout)
    for name, parameter, values in _starting_values(models, architecture, layout, source if finer else None):
        master = getattr(parameter, "main_param", None)
        if master is None:  # all of it is another data-parallel rank's
            continue
        entry = table[name]
        significant = min(finer.get(tensor, BF16) for tensor in entry.hugging_face)
        cut = Cut(architecture, parameter.size(0) * layout.tp, layout.tp_rank, layout.tp)
        rows, columns, width = _lines(entry, architecture, cut)
        rows, columns = rows.to(master.device), columns.to(master.device)
        start = first_place(parameter, optimizer)
        weights, exact, target = parameter.detach().view(-1), values.view(-1), master.detach().view(-1)
        for part in _parts(target.numel()):
            there = slice(start + part.start, start + part.stop)
            places = torch.arange(there.start, there.stop, device=master.device)
            whole = rows[places // len(columns)] * width + columns[places % len(columns)]
            uniform = uniform_numbers(seed, entry.hugging_face[0], whole)
            drawn = dither(exact[there], uniform, significant)
            # Twice rounded, from float64 to float32 to bf16, a number may come to another one than at once.
            same = drawn.bfloat16() == weights[there]
            target[part] = torch.where(same, drawn, weights[there].float())


def _finer_than_bf16(
    source: str | Path, architecture: Architecture, layout: ParallelLayout
) -> dict[str, int]:
    """The significant bits of those Hugging Face tensors that have more than bf16; the same on all ranks."""
    found: list[dict[str, int]] = [{}]
    with raising_together(layout):
        if layout.is_main and not is_checkpoint(source):
            names = (name for entry in entries(architecture) for name in entry.hugging_face)
            bits = significant_bits(WeightReader(source), names)
            found = [{name: number for name, number in bits.items() if number > BF16}]
    dist.broadcast_object_list(found, src=0, group=layout.control)
    return found[0]


def _starting_values(
    models: Sequence[GroupModel],
    architecture: Architecture,
    layout: ParallelLayout,
    folder: str | Path | None,
) -> Iterator[tuple[str, torch.nn.Parameter, Tensor]]:
    """This rank's parameters by their global names, with the folder's values, or without one their own."""
    if folder is not None:
        yield from hf_values(models, architecture, layout, folder)
        return
    for model in models:
        for name, parameter in global_parameter_names(model).items():
            yield name, parameter, parameter.detach()


def master_values(parameter: torch.nn.Parameter, optimizer: Any) -> Tensor:
    """float32 values of a parameter, in its shape: its master's, or its own if it has none.

    With the distributed optimizer each replica has a part of the master; all of them call it.
    """
    master = getattr(parameter, "main_param", None)
    if not getattr(parameter, "main_param_sharded", False):
        return (parameter if master is None else master).detach().float().view(parameter.shape)
    # In integers, to which adding zero leaves every bit.
    whole = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
    if master is not None:
        start = first_place(parameter, optimizer)
        whole[start : start + master.numel()] = master.detach().view(-1).view(torch.int32)
    is_expert = not getattr(parameter, "allreduce", True)
    dist.all_reduce(
        whole,
        group=parallel_state.get_expert_data_parallel_group()
        if is_expert
        else parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    return whole.view(torch.float32).view(parameter.shape)


def first_place(parameter: Any, optimizer: Any) -> int:
    """The place in the flat parameter at which this rank's part of its master begins."""
    if not getattr(parameter, "main_param_sharded", False):
        return 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if parameter in part.model_param_gbuf_map:
            start: int = part._get_model_param_range_map(parameter)["param"].start
            return start
    raise AssertionError("a parameter without an optimizer")


def _parts(size: int) -> Iterator[slice]:
    for start in range(0, size, _CHUNK):
        yield slice(start, min(start + _CHUNK, size))
