"""float32 master weights that begin within the rounding of the bf16 weights, not on their grid.

Megatron makes the masters from the bf16 weights, so each begins exactly on the bf16 grid. At the learning rates of
preference training an update is smaller than half the distance to the next bf16 value: the optimizer moves the masters,
and the forward pass sees nothing until their moves add up to half a unit in the last place. Here each master begins at
a place drawn uniformly from the cell of float32 numbers that round to its bf16 weight. The bf16 weights are the same to
the last bit; and an update of k hundredths of a unit then moves k of a hundred weights, from the first step on.

The draw is a function of the seed, the parameter's name and the element's place in the whole parameter, so that masters
do not depend on the layout. A checkpoint holds the masters: a run that resumes draws nothing.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.conversion.load import global_parameter_names
from mpo_megatron.conversion.names import Entry, by_megatron_name
from mpo_megatron.conversion.transforms import COLUMNS, Cut
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.objectives.splitmix import shift_right, splitmix64
from mpo_megatron.runtime.parallel import ParallelLayout

_CHUNK = 2**22  # elements that are drawn at a time
_HALF = 1 << 15  # float32 steps from a bf16 number to the middle between it and the next larger one


def dither(weights: Tensor, uniform: Tensor) -> Tensor:
    """float32 numbers that round to the given bf16 numbers, spread over the cell of each.

    The bits of a bf16 number are the upper half of those of the same float32 number, so adding k to the lower half,
    |k| < 2**15, goes k float32 steps away from zero, or towards it, and never as far as the middle between two bf16
    numbers. Below a power of two the steps are half as long, and so is that side of the cell: it is drawn half as often
    as the upper one. Zeros, infinities and NaN stay as they are.

    Args:
        weights: bf16, any shape.
        uniform: float64 of the same shape, in [0, 1).
    """
    bits = weights.view(torch.int16).to(torch.int32) << 16
    power_of_two = (bits & 0x7F0000) == 0
    upper = torch.where(power_of_two, 2 / 3, 1 / 2)
    outwards = uniform < upper
    # Where in its side of the cell: [0, 1).
    place = torch.where(outwards, uniform / upper, (uniform - upper) / (1 - upper))
    steps = (place * _HALF).to(torch.int32).clamp_(max=_HALF - 1)
    dithered = (bits + torch.where(outwards, steps, -steps)).view(torch.float32)
    plain = bits.view(torch.float32)
    return torch.where(weights.isfinite() & (weights != 0), dithered, plain)


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


def dither_masters(
    models: Sequence[GroupModel],
    optimizer: Any,
    architecture: Architecture,
    layout: ParallelLayout,
    seed: int,
) -> None:
    """Spread the masters of this rank's bf16 parameters, in place. To be called once, before the first step.

    Args:
        models: unwrapped model chunks.
        optimizer: Megatron's, with the masters of these models as it has made them.
        seed: of the draw.
    """
    table = by_megatron_name(architecture)
    for model in models:
        for name, parameter in global_parameter_names(model).items():
            master = getattr(parameter, "main_param", None)
            if master is None:  # all of it is another data-parallel rank's
                continue
            entry, (source, *_) = table[name], table[name].hugging_face
            cut = Cut(architecture, parameter.size(0) * layout.tp, layout.tp_rank, layout.tp)
            rows, columns, width = _lines(entry, architecture, cut)
            start = _first_place(parameter, optimizer)
            flat, target = parameter.detach().view(-1), master.detach().view(-1)
            for part in _parts(target.numel()):
                places = torch.arange(start + part.start, start + part.stop)
                whole = rows[places // len(columns)] * width + columns[places % len(columns)]
                uniform = uniform_numbers(seed, source, whole).to(flat.device)
                target[part] = dither(flat[start + part.start : start + part.stop], uniform)


def _first_place(parameter: Any, optimizer: Any) -> int:
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
