"""A training step in a process of its own, with the layers and the attention that it takes by itself, where some of
the libraries for GPUs are hidden: python -m tests.gpu.one_machine ARGUMENTS, which are JSON. Prints what it took and
found as a line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.helpers.without import hide, leave_version_4_of_flash_attention


def main(accelerator: str, hidden: list[str], version_4_alone: bool, folder: str, sizes: list[int]) -> None:
    hide(hidden)
    if version_4_alone:
        leave_version_4_of_flash_attention()

    import torch

    from mpo_megatron.model.attention import choose_backend
    from mpo_megatron.model.provider import uses_transformer_engine
    from mpo_megatron.runtime.device import choose_device
    from mpo_megatron.runtime.doctor import judge
    from mpo_megatron.runtime.parallel import shutdown
    from mpo_megatron.runtime.probe import probe
    from tests.distributed.jobs import Layout, build, gradients, logps

    device = choose_device(accelerator)
    backend = choose_backend("auto", device, torch.bfloat16)
    engine = uses_transformer_engine("auto", device, torch.bfloat16)
    layout = Layout(
        precision=torch.bfloat16,
        options={"transformer_engine": engine, "attention_backend": backend},
        accelerator=accelerator,
        distributed_optimizer=True,
    )
    model = build(Path(folder), sizes, layout)
    before = logps(model)
    loss = gradients(model, before, "wmpo")["loss"]
    updated, norm, _ = model.optimizer.step()
    facts: Any = probe()
    found = {
        "attention": backend,
        "transformer_engine": engine,
        "logps": before.tolist(),
        "loss": loss,
        "norm": float(norm),
        "updated": bool(updated),
        "moved": float((logps(model) - before).abs().max()),
        "libraries": {name: library.problem for name, library in facts.libraries.items()},
        "findings": [str(finding) for finding in judge(facts)],
    }
    shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
