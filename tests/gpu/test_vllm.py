"""tools/generate.py's two samplers beside each other: at almost zero temperature both take the likeliest tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.models import make_llama

ROOT = Path(__file__).parents[2]
PROMPTS = [
    "Name three colours of the rainbow in one sentence.",
    "Red?",
    "You are a lazy dog. Jump over the fox.",
]


def sampled(folder: Path, backend: str, *options: str) -> list[dict]:
    output = folder / f"{backend}{'-'.join(options)}.jsonl"
    files = ["--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--output", output]
    sizes = ["--backend", backend, "--max-new-tokens", "8", "--samples", "3"]
    subprocess.run(
        [sys.executable, "tools/generate.py", *map(str, files), *sizes, *options],
        cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=280,
    )  # fmt: skip
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this machine")
    make_llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    records = [{"id": f"p{number}", "prompt": prompt} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.gpu
def test_vllm_takes_the_likeliest_tokens_as_transformers(folder: Path) -> None:
    assert sampled(folder, "vllm", "--temperature", "1e-6") == sampled(folder, "hf", "--temperature", "1e-6")


@pytest.mark.gpu
def test_a_seed_gives_the_same_samples_whatever_is_beside_them(folder: Path) -> None:
    first = sampled(folder, "vllm")
    assert sampled(folder, "vllm", "--batch-size", "3") == first
    assert sampled(folder, "vllm", "--seed", "1") != first
    assert len({response["text"] for group in first for response in group["responses"]}) > 3
