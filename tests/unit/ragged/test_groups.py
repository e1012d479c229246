"""Groups, pairs within groups, and their way to a device."""

from dataclasses import dataclass

import torch

from mpo_megatron.ragged.groups import GroupIndex
from mpo_megatron.ragged.segments import Segments
from mpo_megatron.ragged.transfer import gathered, scattered, to_device


def test_pairs_are_those_of_each_group() -> None:
    index = GroupIndex.of([1, 3, 0, 2])
    pairs = list(zip(index.first.segment.tolist(), index.second.segment.tolist(), strict=True))
    groups = ((0,), (1, 2, 3), (4, 5))
    assert pairs == [(i, j) for group in groups for i in group for j in group]
    assert index.groups.segment.tolist() == [0, 1, 1, 1, 3, 3]
    assert index.pairs.segment.tolist() == [0] + [1] * 9 + [3] * 4
    assert (index.first.order, index.pairs.order) == (None, None)
    first, second = index.both(torch.arange(6.0))
    assert [(int(i), int(j)) for i, j in zip(first, second, strict=True)] == pairs


def test_no_groups() -> None:
    index = GroupIndex.of([])
    assert (index.groups.count, index.first.count, index.pairs.segment.numel()) == (0, 0, 0)


@dataclass(frozen=True)
class Record:
    name: str
    flags: torch.Tensor
    segments: Segments
    none: torch.Tensor | None
    numbers: torch.Tensor


def test_a_record_moves_in_one_copy() -> None:
    segments = Segments.of([1, 0, 1], 2)
    numbers = torch.arange(6, dtype=torch.float64).view(2, 3)
    record = Record("a", torch.tensor([True, False, True]), segments, None, numbers)
    moved = scattered(gathered(record, pin_memory=False), record)
    assert (moved.name, moved.none) == ("a", None)
    assert isinstance(moved.segments.order, torch.Tensor)
    found = (moved.flags, moved.numbers, moved.segments.segment, moved.segments.offsets, moved.segments.order)
    wanted = (record.flags, numbers, segments.segment, segments.offsets, segments.order)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    on_meta = to_device(record, "meta")
    assert on_meta.segments.segment.is_meta
    assert on_meta.numbers.shape == (2, 3)


def test_a_record_that_stays_on_the_cpu_is_not_copied() -> None:
    segments = Segments.of([1, 0, 1], 2)
    assert to_device(segments, "cpu") is segments
