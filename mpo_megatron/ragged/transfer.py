"""Many small tensors to a device in one copy, which the host does not wait for."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")
# Bytes; every type's values lie where they may.
_ALIGNMENT = 16


def to_device(record: Record, device: torch.device | str) -> Record:
    """A dataclass of CPU tensors, with those of dataclasses among its fields, as one of tensors on `device`.

    They become views of one buffer, so they are freed together.
    """
    found = list(_tensors(record))
    starts, end = [], 0
    for tensor in found:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    # Pageable memory would have the host wait for the copy.
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for tensor, start in zip(found, starts, strict=True):
        _view(buffer, start, tensor).copy_(tensor)
    moved = buffer.to(device, non_blocking=True)
    views = iter([_view(moved, start, tensor) for tensor, start in zip(found, starts, strict=True)])
    return _with_tensors(record, views)


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from `start` as a tensor of the type and shape of `like`."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _tensors(record: Any) -> Iterator[Tensor]:
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _with_tensors(record: Any, tensors: Iterator[Tensor]) -> Any:
    """The record with its tensors replaced, in the order in which `_tensors` gives them."""
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = next(tensors)
        elif is_dataclass(value):
            changed[field.name] = _with_tensors(value, tensors)
    return replace(record, **changed)
