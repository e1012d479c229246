"""The main job's configuration: `schema` (keys and defaults), `rules` (which values there can be), `parse` (from a YAML
and a command line), `groups` (the folders of conf/ of which a YAML takes one file each).

Whatever needs no model and no data is checked here, before anything is started.
"""

from mpo_megatron.config.parse import (
    as_yaml,
    changed,
    check_keys,
    check_numbers,
    check_overrides,
    leaves,
    make_writable,
    parse,
    register_schema,
)
from mpo_megatron.config.schema import (
    KEPT_FAULTS,
    MONITORS,
    CheckpointConfig,
    Config,
    DataConfig,
    FaultConfig,
    ModelConfig,
    MpoConfig,
    OptimConfig,
    ProfileConfig,
    SchedConfig,
    TrainerConfig,
)

__all__ = [
    "KEPT_FAULTS",
    "MONITORS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultConfig",
    "ModelConfig",
    "MpoConfig",
    "OptimConfig",
    "ProfileConfig",
    "SchedConfig",
    "TrainerConfig",
    "as_yaml",
    "changed",
    "check_keys",
    "check_numbers",
    "check_overrides",
    "leaves",
    "make_writable",
    "parse",
    "register_schema",
]
