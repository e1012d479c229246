"""Train a language model with MPO, W-MPO or another objective on groups of scored responses.

    torchrun --nproc-per-node 2 examples/mpo_gpt.py [--config-name NAME] [key=value ...] [group=choice ...]

The configuration is conf/NAME.yaml (mpo_gpt by default; docs/presets.md has those of larger models); every key and its
default is in mpo_megatron/config/. --cfg job prints the composed YAML and runs nothing.
"""

import os
import sys
from pathlib import Path

from mpo_megatron.runtime.quiet import quiet_third_parties

quiet_third_parties()

from hydra._internal.utils import get_args_parser  # noqa: E402  (as hydra_runner has it)
from nemo.core.config import hydra_runner  # noqa: E402  (its import warns)
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from mpo_megatron.config import Config, parse, register_schema  # noqa: E402
from mpo_megatron.config.groups import Yaml, compose_yaml  # noqa: E402
from mpo_megatron.errors import ConfigError, UserError  # noqa: E402
from mpo_megatron.runtime.meeting import starting_together  # noqa: E402
from mpo_megatron.runtime.parent import end_with_launcher  # noqa: E402
from mpo_megatron.training.trainer import train  # noqa: E402

_composed: list[DictConfig] = []


@hydra_runner(config_path="../conf", config_name="mpo_gpt")
def compose(raw: DictConfig) -> None:
    """Hand the composed YAML out. The job itself runs outside of Hydra, which would print a traceback of its errors."""
    _composed.append(raw)


def configurations() -> list[Config]:
    """What the command asks to train: nothing where Hydra is asked to print instead.

    Raises:
        ConfigError: the YAML that the command names, what it takes, an override or an option is not as it must be.
    """
    options = get_args_parser().parse_args()
    if options.multirun:
        raise ConfigError("--multirun: a job trains one model; tools/compare_objectives.py makes a sweep")
    beside = Path(os.path.normpath(Path(__file__).resolve().parent / (options.config_path or "../conf")))
    folders = [Path(options.config_dir).absolute(), beside] if options.config_dir else [beside]
    # Before Hydra does, whose errors have several lines.
    composed = compose_yaml(Yaml.named(options.config_name or "mpo_gpt", folders), options.overrides)
    try:
        if options.resolve:
            OmegaConf.resolve(composed)
        compose()
    # A value that refers to nothing; options that do not go together.
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return [parse(raw) for raw in _composed]


def main() -> int:
    """Run the job. Returns the exit status; what a user must mend is one sentence, not a traceback."""
    end_with_launcher()
    register_schema()
    try:
        with starting_together():
            configs = configurations()
        for config in configs:
            train(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            # The end of a progress bar's line, where both streams go to one file.
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
