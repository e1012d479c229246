"""tools/doctor.py as a command: here, without torch, and with a torch that does not load."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpo_megatron.runtime.doctor import judge
from tests.helpers.machines import NODE
from tools.doctor import advice, described

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "doctor.py"


def run(
    *arguments: str, environment: dict[str, str] | None = None, flags: tuple[str, ...] = ()
) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *flags, str(TOOL), *arguments], capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", **(environment or {})},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_machine_without_a_gpu_runs_on_its_cpu(tmp_path: Path) -> None:
    status, output = run("--cache", str(tmp_path), "--output", str(tmp_path / "experiments"))
    assert status == 0
    facts, _, findings = output.partition("\n\n")
    lines = {line.split("  ")[0].strip(): line.split("  ")[-1].strip() for line in facts.splitlines()}
    assert lines["torch"].startswith(f"torch {torch.__version__}, built for")
    assert lines["megatron-core"].startswith("megatron-core 0.1")
    assert lines["attention"] == "sdpa, of torch"
    assert lines["GPUs"] == "none"
    assert "there is no NVIDIA GPU" in findings
    assert "the run takes the CPU" in findings


def test_no_torch(tmp_path: Path) -> None:
    status, output = run("--cache", str(tmp_path), flags=("-S",))  # without the environment's packages
    assert status == 1
    assert "stops a run:\n  torch is not installed\n" in output
    assert "mend    run bash tools/setup_venv.sh" in output


def test_a_torch_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object file')"
    )
    status, output = run("--cache", str(tmp_path), environment={"PYTHONPATH": str(tmp_path)})
    assert status == 1
    assert "torch cannot be imported (OSError: libcudart.so.13: cannot open shared object file)" in output


def test_a_folder_that_cannot_be_written_stops_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, output = run("--cache", str(tmp_path / "file" / "cache"), flags=("-S",))
    assert status == 1
    assert f"{tmp_path}/file/cache cannot be written (Not a directory)" in output


def test_a_node_is_described() -> None:
    lines = described(NODE)
    for line in (
        "torch          torch 2.13.0, built for CUDA 13.0",
        "driver         580.95.05, CUDA up to 13.0",
        "attention      varlen, of flash-attn 2.7.4",
        "GPU 7          NVIDIA H100 80GB HBM3, 85 GB, compute capability 9.0",
        "GPUs           8, peer access between all, NVLink",
        "InfiniBand     mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR)",
    ):
        assert " ".join(line.split()) in [" ".join(found.split()) for found in lines]
    assert any("of Transformer Engine 2.16.0 in bf16: norms" in line for line in lines)
    assert advice(judge(NODE)) == ["nothing is missing"]
    told = advice(judge(replace(NODE, nvlink=False)))
    assert told[0] == "costs something:"
    assert told[1] == "  no NVLink joins the GPUs"
