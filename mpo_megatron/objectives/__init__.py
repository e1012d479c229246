"""Objectives: per-response log-probabilities and scores in, per-group losses out. No Megatron here.

Importing this package registers every objective; `names()` lists them, `get(name)` returns the entry, and `settle` and
`bind` give it the hyper-parameters of a configuration.
"""

from mpo_megatron.objectives import listwise as _listwise  # noqa: F401  (registers)
from mpo_megatron.objectives import mpo as _mpo  # noqa: F401
from mpo_megatron.objectives import pairwise as _pairwise  # noqa: F401
from mpo_megatron.objectives import pointwise as _pointwise  # noqa: F401
from mpo_megatron.objectives.binding import bind, settle
from mpo_megatron.objectives.registry import Entry, GroupBatch, ObjectiveResult, get, names, register

__all__ = ["Entry", "GroupBatch", "ObjectiveResult", "bind", "get", "names", "register", "settle"]
