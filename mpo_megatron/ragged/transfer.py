"""Many small tensors to a device in one copy, which the host does not wait for."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")
# Bytes; every type's values lie where they may.
_ALIGNMENT = 16


class Staged(Generic[Record]):
    """A dataclass of CPU tensors, with those of dataclasses among its fields, made ready to go to a device.

    For a GPU the values are gathered in one buffer of pinned memory: from pageable memory the host would wait for the
    copy. Making it touches nothing of the device, so a thread may do it beside a step. On the CPU nothing is copied.
    """

    def __init__(self, record: Record, device: torch.device | str) -> None:
        self._record = record
        self._device = torch.device(device)
        self._buffer = None
        if self._device.type != "cpu":
            self._buffer = gathered(record, pin_memory=self._device.type == "cuda")

    def arrive(self) -> Record:
        """The record on the device, as views of one buffer, which are freed together.

        The copy runs on the current stream and the host does not wait for it. Torch's allocator of pinned memory notes
        the copy and reuses the buffer only when it is done, whoever lets go of it before.
        """
        if self._buffer is None:
            return self._record
        return scattered(self._buffer.to(self._device, non_blocking=True), self._record)


def to_device(record: Record, device: torch.device | str) -> Record:
    """A dataclass of CPU tensors, with those of dataclasses among its fields, as one of tensors on `device`."""
    return Staged(record, device).arrive()


def gathered(record: Any, *, pin_memory: bool) -> Tensor:
    """The values of a record's CPU tensors in one buffer, [bytes] uint8."""
    found = list(_tensors(record))
    starts = _starts(found)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin_memory)
    for tensor, start in zip(found, starts, strict=False):
        _view(buffer, start, tensor).copy_(tensor)
    return buffer


def scattered(buffer: Tensor, like: Record) -> Record:
    """A record as `like`, of which `gathered` made the buffer, whose tensors are views of the buffer."""
    found = list(_tensors(like))
    views = [_view(buffer, start, tensor) for tensor, start in zip(found, _starts(found), strict=False)]
    return _with_tensors(like, iter(views))


def _starts(tensors: list[Tensor]) -> list[int]:
    """Where in the buffer each begins, in bytes, and where the buffer ends."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return starts


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
