"""Set-level preference training (MPO, W-MPO) on Megatron-core.

The objectives need torch alone and are importable from here without Megatron or a GPU::

    from mpo_megatron import mpo_loss
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo_megatron.objectives.mpo import mpo_loss

__version__ = "0.1.0"

__all__ = ["__version__", "mpo_loss"]


def __getattr__(name: str) -> Any:
    """Import torch when it is asked for: tools/doctor.py runs without."""
    if name == "mpo_loss":
        from mpo_megatron.objectives.mpo import mpo_loss

        return mpo_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
