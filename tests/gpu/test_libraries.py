"""Which layers and attention a run takes by itself where some of the libraries for GPUs are missing, and that it trains
with them: log-probs of a step in bf16 against transformers in float64.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.model.architecture import read_architecture
from tests.gpu.conftest import Place, on_cpu, on_gpu
from tests.gpu.ranks import GPU_ENVIRONMENT
from tests.helpers.models import hugging_face_logps, make_groups, make_llama
from tests.helpers.without import GPU_LIBRARIES

ROOT = Path(__file__).parents[2]
SIZES = [2, 5, 3]


@dataclass(frozen=True)
class Machine:
    """What is left on it: functions of `runtime.capabilities` that it needs, and modules that are hidden."""

    needs: tuple[str, ...]
    hidden: tuple[str, ...]
    version_4_alone: bool = False


EVERYTHING = tuple(GPU_LIBRARIES)
MACHINES = {
    "FlashAttention 2 alone": Machine(
        ("flash_attention",), ("transformer_engine", "flash_attn_interface", "apex")
    ),
    "FlashAttention 4 alone": Machine((), tuple(set(EVERYTHING) - {"flash_attn"}), version_4_alone=True),
    "torch's kernel alone": Machine(("torch_varlen_attention",), EVERYTHING),
    "Transformer Engine alone": Machine(
        ("transformer_engine",), ("flash_attn", "flash_attn_interface", "apex")
    ),
    "no apex": Machine(("transformer_engine",), ("apex",)),
    "everything": Machine(("transformer_engine", "flash_attention"), ()),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = make_llama(tmp_path_factory.mktemp("model"), head_dim=64, initializer_range=0.15)
    groups = make_groups(SIZES, read_architecture(folder).vocab_size, seed=0)
    return folder, hugging_face_logps(folder, groups, torch.float64)


@pytest.mark.parametrize(
    ("place", "name"),
    [on_cpu("FlashAttention 4 alone"), *(on_gpu(name) for name in MACHINES)],
    indirect=["place"],
)
def test_a_machine_trains_with_what_it_has(
    name: str, place: Place, model: tuple[Path, torch.Tensor], measured: Any
) -> None:
    machine, (folder, wanted) = MACHINES[name], model
    for library in machine.needs:
        place.needs_library(library)
    given = [place.accelerator, machine.hidden, machine.version_4_alone, str(folder), SIZES]
    environment = GPU_ENVIRONMENT if place.is_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.one_machine", json.dumps(given)],
        cwd=ROOT, text=True, capture_output=True, timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])

    torch_has_one = found["libraries"]["torch varlen"] is None
    engine = "transformer_engine" in machine.needs
    if not place.is_gpu:
        assert (found["transformer_engine"], found["attention"]) == (False, "sdpa")
    else:
        assert found["transformer_engine"] == engine
        capable = torch.cuda.get_device_capability() >= (8, 0)
        has_kernel = torch_has_one or found["libraries"]["flash-attn"] is None
        assert found["attention"] == (
            "sdpa" if not capable else "varlen" if has_kernel else "te" if engine else "sdpa"
        )
        assert engine or any("Transformer Engine" in finding for finding in found["findings"])
    if machine.version_4_alone:
        assert "cannot import name 'flash_attn_varlen_func'" in found["libraries"]["flash-attn"]
    if "apex" in machine.hidden:
        assert found["libraries"]["apex"] == "is not installed"
    assert found["updated"]
    assert found["moved"] > 0
    assert found["norm"] > 0
    off = (torch.tensor(found["logps"]).double() - wanted).abs() / wanted.abs()
    measured("log-probs, relative", float(off.max()), at_most=0.05)
