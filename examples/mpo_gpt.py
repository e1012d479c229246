"""Train a language model with MPO, W-MPO or another objective on groups of scored responses.

    torchrun --nproc-per-node 2 examples/mpo_gpt.py [--config-name NAME] [key=value ...]

The configuration is conf/NAME.yaml (mpo_gpt by default); every key and its default is in mpo_megatron/config.py.
"""

import os
import sys

from mpo_megatron.runtime.quiet import quiet_third_parties

quiet_third_parties()

from nemo.core.config import hydra_runner  # noqa: E402  (its import warns)
from omegaconf import DictConfig  # noqa: E402

from mpo_megatron.config import check_overrides, parse, register_schema  # noqa: E402
from mpo_megatron.errors import UserError  # noqa: E402
from mpo_megatron.runtime.meeting import starting_together  # noqa: E402
from mpo_megatron.training.trainer import train  # noqa: E402

_composed: list[DictConfig] = []


@hydra_runner(config_path="../conf", config_name="mpo_gpt")
def compose(raw: DictConfig) -> None:
    """Hand the composed YAML out. The job itself runs outside of Hydra, which would print a traceback of its errors."""
    _composed.append(raw)


def main() -> int:
    """Run the job. Returns the exit status; what a user must mend is one sentence, not a traceback."""
    register_schema()
    try:
        with starting_together():
            check_overrides(sys.argv[1:])
            compose()
            config = parse(_composed[0])
        train(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
