"""The forms in which checkpoints hold the state of Megatron's distributed optimizer.

`dp_reshardable`: each rank writes its part of each bucket as it lies; nothing is gathered. Megatron itself reads it at
another number of data-parallel ranks alone; with what `conversion.buckets` writes beside it, it is read at any layout.

`fully_reshardable`: in the parameters' own shapes, which any layout of Megatron reads, NeMo's and Megatron-LM's own
included. The first of the ranks that share a parameter's state gathers it, all 12 bytes a parameter, in host memory.

Of either form each rank reads what it needs for its own part of the state, a parameter at a time. (Megatron makes room
for the whole state on every rank first.)

The plain optimizer has the whole state on each rank, in the parameters' shapes: it needs no form.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mpo_megatron.conversion.buckets import Piece, StateReader
from mpo_megatron.errors import CheckpointError

BUCKETS = "dp_reshardable"
WHOLE = "fully_reshardable"
# Megatron's name of the form in what it writes about a checkpoint's content.
FORM = "distrib_optim_sharding_type"
_MEMORY_EFFICIENT = "distrib_optim_fully_reshardable_mem_efficient"


def content(optimizer: Any, form: str) -> dict[str, Any]:
    """What is to be written about a checkpoint's content, and what Megatron is asked for: nothing of a plain optimizer.

    Args:
        form: BUCKETS or WHOLE.
    """
    return {FORM: form, _MEMORY_EFFICIENT: True} if is_distributed(optimizer) else {}


def is_distributed(optimizer: Any) -> bool:
    return all(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))


def check_kind(path: Path, saved: dict[str, Any] | None, optimizer: Any) -> None:
    """Check that a checkpoint's state is of this kind of optimizer.

    Args:
        saved: what is written about the content; None: an older checkpoint, which says nothing.

    Raises:
        CheckpointError: it is the other kind's.
    """
    if saved is None:
        return
    was, now = FORM in saved, is_distributed(optimizer)
    if was != now:
        raise CheckpointError(
            f"{path} was saved with model.optim.distributed={str(was).lower()}, and the state of that optimizer "
            f"is not this one's; set it so, or start a new run from the weights with model.restore_from_path={path}"
        )


def sharded_state(optimizer: Any, models: dict[str, Any], form: str) -> dict[Any, Any]:
    """The optimizer's sharded state dictionary, to save it; with WHOLE, all ranks gather it.

    Args:
        models: sharded state dictionaries of the model chunks.
    """
    wanted = content(optimizer, form)
    if is_distributed(optimizer) and form == WHOLE:
        with _places_without_padding(optimizer):
            whole: dict[Any, Any] = optimizer.sharded_state_dict(models, metadata=wanted)
        return whole
    found: dict[Any, Any] = optimizer.sharded_state_dict(models, metadata=wanted)
    if is_distributed(optimizer):
        _cut_padding(found)
    return found


@contextmanager
def _places_without_padding(optimizer: Any) -> Iterator[None]:
    """Have Megatron find each parameter where it is once the buckets are put together.

    It leaves out the padding at a bucket's end, and goes by places that count it: from the second bucket on it would
    write other numbers than the parameter's (megatron-core 0.16 to 0.19).
    """
    buffers = [buffer for part in _parts(optimizer) for buffer in part.buffers]
    originals = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        starts = list(accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        shifts = [start - bucket.offset for start, bucket in zip(starts, buffer.buckets, strict=False)]
        buffer.param_index_map = {
            parameter: (start + shifts[bucket], end + shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, original in zip(buffers, originals, strict=True):
            buffer.param_index_map = original


def _cut_padding(state: dict[Any, Any]) -> None:
    """End the padding of each bucket where the bucket ends.

    Megatron's goes beyond it where the parameters before a shared embedding end within an alignment of 64.
    """
    for one in nested_values(state):
        if isinstance(one, ShardedTensor):
            (offset,), (size,), (end,) = one.global_offset, one.local_shape, one.global_shape
            if offset + size > end:
                one.data, one.local_shape = one.data[: end - offset], (end - offset,)


def pieces(optimizer: Any, models: dict[str, Any], state: dict[Any, Any]) -> list[Piece]:
    """What the buckets of this rank hold, those whose first part it has; over all ranks that is each bucket once.

    Args:
        models: sharded state dictionaries of the model chunks.
        state: of the form BUCKETS, from `sharded_state`.
    """
    named, found = _by_parameter(models), []
    for part, own in zip(_parts(optimizer), _states(state), strict=True):
        if part.data_parallel_group.rank():
            continue
        for number, buffer in enumerate(part.buffers):
            ((_, buckets),) = own["param_state"][number].items()
            for parameter, (start, _, bucket) in buffer.param_index_map.items():
                name = next(one["param"].key for one in buckets[bucket] if "param" in one)
                start -= buffer.buckets[bucket].offset
                found += list(_pieces(named[id(parameter)], name.removesuffix(".param"), start))
    return found


def _pieces(sharded: ShardedTensor | ShardedTensorFactory, bucket: str, start: int) -> Iterator[Piece]:
    """The boxes of a parameter that lies at `start`: two of a gated layer's first matrix, else one."""
    parameter = sharded.data
    built = sharded.build() if isinstance(sharded, ShardedTensorFactory) else sharded
    for one in nested_values([built]):
        values = one.data.detach()
        assert values.is_contiguous(), f"{one.key} does not lie in its bucket row by row"
        skipped = values.storage_offset() - parameter.storage_offset()
        sizes = (1,) * one.prepend_axis_num + tuple(one.local_shape)
        yield Piece(
            one.key, tuple(one.global_shape), tuple(one.global_offset), sizes, bucket, start + skipped
        )


def request(optimizer: Any, models: dict[str, Any], form: str, rank: int) -> dict[str, Any]:
    """What to ask Megatron for when a checkpoint is loaded: all of a plain optimizer.

    Of a distributed one what is not of a parameter: steps and hyper-parameters, which are the same on all ranks. With
    BUCKETS they are an object of each model-parallel rank, with WHOLE they come without being asked for.

    Args:
        models: sharded state dictionaries of the model chunks.
        rank: among all.
    """
    if not is_distributed(optimizer):
        return {"optimizer": optimizer.sharded_state_dict(models, is_loading=True)}
    if form == WHOLE:
        return {}
    groups = [
        {"optimizer": ShardedObject(f"{prefix}optimizer.distributed.dp_group_idx_0.optimizer", None, (1,), (0,), rank)}
        for prefix in _prefixes(optimizer)
    ]  # fmt: skip
    return {"optimizer": groups[0] if len(groups) == 1 else dict(enumerate(groups))}


@torch.no_grad()
def read_state(optimizer: Any, models: dict[str, Any], reader: StateReader) -> None:
    """Read this rank's part of the distributed optimizer's masters and moments, of either form.

    Args:
        models: sharded state dictionaries of the model chunks.

    Raises:
        CheckpointError: some of it is not there.
    """
    named = _by_parameter(models)
    for part, prefix in zip(_parts(optimizer), _prefixes(optimizer), strict=True):
        for parameter, own in _own_parameters(part):
            boxes = list(_pieces(named[id(parameter)], "", 0))
            tensors: dict[str, Tensor] = {}
            for key in part._get_main_param_and_optimizer_states(parameter).keys() - {"step"}:
                values = torch.zeros(own.end - own.start)
                for box in boxes:
                    low = max(own.start, box.start)
                    high = min(own.end, box.start + torch.Size(box.sizes).numel())
                    if low < high:
                        values[low - own.start : high - own.start] = reader.read_flat(
                            f"{prefix}optimizer.state.{key}.{box.parameter}",
                            box.offsets, box.sizes, low - box.start, high - box.start,
                        )  # fmt: skip
                tensors[key] = values
            part._set_main_param_and_optimizer_states(parameter, tensors)


def _own_parameters(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """The parameters of which this rank has a part, and which: a range of their elements, row by row."""
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    yield parameter, places["param"]


def _by_parameter(models: dict[str, Any]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """What Megatron says of each parameter in a checkpoint, by the parameter's id."""
    sharded, _ = extract_sharded_tensors_and_factories(models)
    return {id(one.data): one for one in nested_values(sharded)}


def _prefixes(optimizer: Any) -> list[str]:
    """Of the names of each part's state."""
    count = len(_parts(optimizer))
    return [""] if count == 1 else [f"chained_{number}." for number in range(count)]


def _parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers: where there are experts two, theirs the second."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _states(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """The states of those optimizers."""
    return [state[key] for key in sorted(state)] if 0 in state else [state]
