"""Set-level preference training (MPO, W-MPO) on Megatron-core.

The objectives need torch alone and are importable from here without Megatron or a GPU::

    from mpo_megatron import mpo_loss
"""

from mpo_megatron.objectives.mpo import mpo_loss

__version__ = "0.1.0"

__all__ = ["__version__", "mpo_loss"]
