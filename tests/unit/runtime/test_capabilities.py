"""Libraries for GPUs that are there, half there, broken or too old, in a Python process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ASK = "from mpo_megatron.runtime import capabilities as c; print(c.{name}().name, '|', c.{name}().problem)"


def asked(name: str, site: Path) -> str:
    """What a process with these packages first on its path says."""
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(name=name)], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def package(site: Path, name: str, files: dict[str, str], version: str) -> Path:
    for path, text in files.items():
        (site / name / path).parent.mkdir(parents=True, exist_ok=True)
        (site / name / path).write_text(text)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    )
    return site


@pytest.mark.parametrize(
    ("files", "version", "expected"),
    [
        ({"__init__.py": "def flash_attn_varlen_func(): ..."}, "2.8.3", "flash-attn 2.8.3 | None"),
        (
            {"cute/__init__.py": ""},  # version 4 alone
            "4.0.0",
            "flash-attn 4.0.0 | cannot be imported (ImportError: cannot import name 'flash_attn_varlen_func'",
        ),
        (
            {"__init__.py": "raise OSError('libtorch.so: undefined symbol')"},
            "2.8.3",
            "flash-attn 2.8.3 | cannot be imported (OSError: libtorch.so: undefined symbol)",
        ),
    ],
)
def test_flash_attention(files: dict[str, str], version: str, expected: str, tmp_path: Path) -> None:
    site = package(tmp_path, "flash_attn", files, version)
    assert asked("flash_attention", site).startswith(expected)


def test_what_is_not_installed(tmp_path: Path) -> None:
    assert asked("flash_attention", tmp_path) == "flash-attn | is not installed"
    assert asked("transformer_engine", tmp_path) == "Transformer Engine | is not installed"


@pytest.mark.parametrize(
    ("version", "problem"), [("3.7.1", "None"), ("3.1.0+git1", "is too old; 3.2 or later is needed")]
)
def test_triton(version: str, problem: str, tmp_path: Path) -> None:
    files = {"__init__.py": f"__version__ = '{version}'", "language.py": ""}
    assert asked("triton", package(tmp_path, "triton", files, version)) == f"triton {version} | {problem}"


def test_a_transformer_engine_that_does_not_load(tmp_path: Path) -> None:
    """Megatron-core's own import of it fails too, which is caught where it happens."""
    files = {"__init__.py": "", "pytorch/__init__.py": "raise RuntimeError('built for torch 2.4')"}
    found = asked("transformer_engine", package(tmp_path, "transformer_engine", files, "2.20.0"))
    assert found == "Transformer Engine 2.20.0 | cannot be imported (RuntimeError: built for torch 2.4)"
