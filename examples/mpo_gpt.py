"""Train a language model with MPO, W-MPO or another objective on groups of scored responses.

    torchrun --nproc-per-node 2 examples/mpo_gpt.py [--config-name NAME] [key=value ...] [group=choice ...]

The configuration is conf/NAME.yaml (mpo_gpt by default; docs/presets.md has those of larger models); every key and its
default is in mpo_megatron/config/. --cfg job prints the composed YAML and runs nothing.
"""

import argparse
import os
import sys
from pathlib import Path

from mpo_megatron.runtime.quiet import quiet_third_parties

quiet_third_parties()

from nemo.core.config import hydra_runner  # noqa: E402  (its import warns)
from omegaconf import DictConfig  # noqa: E402

from mpo_megatron.config import parse, register_schema  # noqa: E402
from mpo_megatron.config.groups import check_command  # noqa: E402
from mpo_megatron.errors import UserError  # noqa: E402
from mpo_megatron.runtime.meeting import starting_together  # noqa: E402
from mpo_megatron.runtime.parent import end_with_launcher  # noqa: E402
from mpo_megatron.training.trainer import train  # noqa: E402

_composed: list[DictConfig] = []


@hydra_runner(config_path="../conf", config_name="mpo_gpt")
def compose(raw: DictConfig) -> None:
    """Hand the composed YAML out. The job itself runs outside of Hydra, which would print a traceback of its errors."""
    _composed.append(raw)


def chosen_yaml(arguments: list[str]) -> Path:
    """The YAML that Hydra's options name."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-name", "-cn", default="mpo_gpt")
    parser.add_argument("--config-path", "-cp", default="../conf")
    parser.add_argument("--config-dir", "-cd")
    options, _ = parser.parse_known_args(arguments)
    name = f"{options.config_name.removesuffix('.yaml')}.yaml"
    beside = Path(__file__).resolve().parent / options.config_path / name
    added = Path(options.config_dir or ".").resolve() / name
    return Path(os.path.normpath(added if options.config_dir and added.is_file() else beside))


def main() -> int:
    """Run the job. Returns the exit status; what a user must mend is one sentence, not a traceback."""
    end_with_launcher()
    register_schema()
    try:
        with starting_together():
            check_command(chosen_yaml(sys.argv[1:]), sys.argv[1:])
            compose()
            # None where Hydra was asked to print something instead.
            configs = [parse(raw) for raw in _composed]
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
