"""Objectives: per-response log-probabilities and scores in, per-group losses out. No Megatron here.

Importing this package registers every objective; `names()` lists them, `get(name)` returns the function.
"""

from mpo_megatron.objectives import mpo as _mpo  # noqa: F401  (registers)
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, get, names, register

__all__ = ["GroupBatch", "ObjectiveResult", "get", "names", "register"]
