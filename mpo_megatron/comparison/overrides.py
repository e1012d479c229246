"""Overrides of a comparison: those of any YAML, less the keys that the comparison sets itself."""

from functools import partial

from mpo_megatron import overrides

MPO = "model.mpo."
# By key, where it is said instead.
OWN = {
    "trainer.seed": "`seeds` of the comparison file",
    "exp_manager.explicit_log_dir": "--output",
    "exp_manager.resume_if_exists": "the comparison, whose runs go on from their newest checkpoint",
}

as_typed = partial(overrides.as_typed, own=OWN)
checked = partial(overrides.checked, own=OWN)
