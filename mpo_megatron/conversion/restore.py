"""Fill Megatron models from a distributed checkpoint: at any layout, under either layer spec.

The two layer specs of Megatron name the norms differently (Transformer Engine fuses them with the linear layer behind),
but not in checkpoints, where both use the fused names. What differs is `_extra_state`, in which Transformer Engine's
modules keep FP8 scales: a checkpoint made without them has none, or none for some modules. Nothing else may be absent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.errors import CheckpointError, UserError
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.runtime.parallel import ParallelLayout, raise_together

_EXTRA_STATE = "_extra_state"


def load_state(state: dict[str, Any], folder: str | Path, layout: ParallelLayout) -> dict[str, Any]:
    """Load a sharded state dictionary from a checkpoint; `_extra_state` that it lacks is left out. All ranks call it.

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
    present = set(reader.objects)
    _, wanted = extract_matching_values(
        state,
        lambda v: isinstance(v, ShardedObject) and _EXTRA_STATE in v.key and v.unique_key not in present,
    )
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    except (Exception, CheckpointException) as caught:
        # On all ranks, since torch's loader hands a rank's error on to the others; its CheckpointException, which is no
        # Exception, has each rank's.
        failures = list(caught.failures.values()) if isinstance(caught, CheckpointException) else []
        reason = failures[0][0] if failures else caught
        raise CheckpointError(
            f"{folder} cannot be loaded into this model ({' '.join(str(reason).split())[:300]})"
        ) from caught
    return loaded


def fill_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a model's state; only `_extra_state` may be missing from it."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith(_EXTRA_STATE)]
    assert not missing, f"missing {missing}"
    assert not unexpected, f"unexpected {unexpected}"


def load_megatron_weights(models: Sequence[GroupModel], layout: ParallelLayout, folder: str | Path) -> None:
    """Fill this rank's unwrapped model chunks; all ranks call it.

    Raises:
        CheckpointError: see `load_state`.
    """
    states = {f"model{i}": model.sharded_state_dict() for i, model in enumerate(models)}
    loaded = load_state(states, folder, layout)
    for i, model in enumerate(models):
        fill_model(model, loaded[f"model{i}"])
