"""Fill Megatron models from a distributed checkpoint: at any layout, under either layer spec.

The two layer specs of Megatron name the norms differently (Transformer Engine fuses them with the linear layer behind),
but not in checkpoints, where both use the fused names. What differs is `_extra_state`, in which Transformer Engine's
modules keep FP8 scales: a checkpoint made without them has none, or none for some modules. Nothing else may be absent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    load_content_metadata,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.errors import CheckpointError, UserError
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.runtime.parallel import ParallelLayout, raise_together, raising_together

_EXTRA_STATE = "_extra_state"
# Without it Transformer Engine (2.20) refuses to read delayed scales, which it keeps as pickles.
_ALLOWS_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def load_state(
    state: dict[str, Any], folder: str | Path, layout: ParallelLayout, *, extra_state: bool = True
) -> dict[str, Any]:
    """Load a sharded state dictionary from a checkpoint; `_extra_state` that it lacks is left out. All ranks call it.

    Of the ranks that want the same tensor one reads it and sends it to the others.

    Args:
        extra_state: whether to load what there is of it; a model that only takes weights has no use for it.

    Raises:
        CheckpointError: the folder is no such checkpoint, is incomplete, or is of another model; on all ranks.
    """
    reader, error = None, None
    try:
        reader = CheckpointReader(folder)
    except UserError as caught:
        error = caught
    raise_together(error, layout)
    assert reader is not None
    present = set(reader.objects) if extra_state else set()
    _, wanted = extract_matching_values(
        state,
        lambda v: isinstance(v, ShardedObject) and _EXTRA_STATE in v.key and v.unique_key not in present,
    )
    try:
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)), replicas()
        )
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder), strategy)
    except (Exception, CheckpointException) as caught:
        # On all ranks, since torch's loader hands a rank's error on to the others; its CheckpointException, which is no
        # Exception, has each rank's.
        failures = list(caught.failures.values()) if isinstance(caught, CheckpointException) else []
        reason = failures[0][0] if failures else caught
        raise CheckpointError(
            f"{folder} cannot be loaded into this model ({' '.join(str(reason).split())[:300]})"
        ) from caught
    return loaded


def replicas() -> Any:
    """The ranks that have the same parameters, but for experts: among them the writing and the reading is shared."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def read_content(folder: str | Path, layout: ParallelLayout) -> dict[str, Any] | None:
    """What a checkpoint says about its content; None: nothing, as those that are older. All ranks call it.

    Raises:
        CheckpointError: the folder is no complete checkpoint; on all ranks.
    """
    found: list[dict[str, Any] | None] = [None]
    with raising_together(layout):
        if layout.is_main:
            CheckpointReader(folder)
            found = [load_content_metadata(str(folder))]
    dist.broadcast_object_list(found, src=0, group=layout.control)
    return found[0]


def fill_model(model: nn.Module, state: dict[str, Any], folder: str | Path) -> None:
    """Load a model's state, of the checkpoint `folder`; only `_extra_state` may be missing from it.

    Raises:
        CheckpointError: it has the past of delayed FP8 scales, and reading that has not been allowed.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        if _ALLOWS_PICKLES not in str(error):
            raise
        raise CheckpointError(
            f"{folder} has the past of delayed FP8 scales as Python pickles, which can run any code, and Transformer "
            f"Engine reads them only where {_ALLOWS_PICKLES}=1; set that if you trust the checkpoint (another "
            "model.fp8_recipe has no past, and a new run that starts from its weights needs none)"
        ) from error
    missing = [name for name in missing if not name.endswith(_EXTRA_STATE)]
    assert not missing, f"missing {missing}"
    assert not unexpected, f"unexpected {unexpected}"


def load_megatron_weights(models: Sequence[GroupModel], layout: ParallelLayout, folder: str | Path) -> None:
    """Fill this rank's unwrapped model chunks with weights alone; all ranks call it.

    Raises:
        CheckpointError: see `load_state`.
    """
    states = {f"model{i}": model.sharded_state_dict() for i, model in enumerate(models)}
    loaded = load_state(states, folder, layout, extra_state=False)
    for i, model in enumerate(models):
        fill_model(model, loaded[f"model{i}"], folder)
