"""The command: import, verify, inspect and export as a user types them, and one sentence for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.models import make_llama
from tools import convert_checkpoint

TOOL = Path(convert_checkpoint.__file__)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
    }  # else a warning where the host's name has no address
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_a_model_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_llama(tmp_path / "source")
    size = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    assert convert_checkpoint.main(["import", "--hf", str(source), "--output", str(imported)]) == 0
    assert (
        capsys.readouterr().out
        == f"{imported}: Megatron checkpoint of {source}, for model.restore_from_path\n"
    )

    assert convert_checkpoint.main(["inspect", str(imported), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert f"{imported}: Megatron distributed checkpoint (torch_dist)" in printed
    assert f"model      llama, {size:,} parameters: 4 layers of 32, 4 heads over 2, vocabulary" in printed
    assert f"weights    8 tensors, {4 * size / 1e9:.3g} GB of float32" in printed
    assert "optimizer  none" in printed
    assert "decoder.layers.mlp.linear_fc2.weight  float32 [4, 32, 48]" in printed

    done = run("verify", "--hf", source, "--checkpoint", imported)
    assert done.returncode == 0, done.stderr
    assert "tokens in float32: log-probabilities differ by at most " in done.stdout
    assert "in the mean: the same model (tolerance 0.001)\n" in done.stdout
    # What torch says of itself where there is a CUDA toolkit and no GPU.
    assert [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line] == []

    assert convert_checkpoint.main(["export", "--checkpoint", str(imported), "--output", str(exported)]) == 0
    assert f"{exported}: Hugging Face folder of {imported}" in capsys.readouterr().out
    assert convert_checkpoint.main(["inspect", str(exported)]) == 0
    size = (exported / "model.safetensors").stat().st_size
    assert f"weights    38 tensors, {size / 1e9:.3g} GB of float32" in capsys.readouterr().out


def test_a_difference_is_found(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    convert_checkpoint.main(["import", "--hf", str(source), "--output", str(tmp_path / "imported")])
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3] += 0.1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text").write_text("the quick brown fox " * 20)
    done = run("verify", "--hf", source, "--checkpoint", tmp_path / "imported", "--text", tmp_path / "text")
    assert done.returncode == 1
    assert "NOT the same model (tolerance 0.001)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--hf", "absent", "--output", "new"], "there is no config.json in"),
        (["import", "--hf", "source", "--output", "source"], "--output source is there already; remove it or"),
        (["export", "--checkpoint", "source", "--output", "new"], "not a complete Megatron distributed checkpoint"),
        (["inspect", "absent"], "is neither a Hugging Face folder"),
        (["import", "--hf", "quantised", "--output", "new"], "the weights are quantised"),
        (["import", "--hf", "unknown", "--output", "new"], "model_type 'gpt2' is not supported; supported are llama"),
        (["import", "--hf", "other", "--output", "new"], "mlp.gate_proj.weight has the shape (48, 32), and by"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.loads((make_llama(Path("source")) / "config.json").read_text())
    changes: dict[str, dict[str, object]] = {
        "quantised": {"quantization_config": {"quant_method": "fp8"}},
        "unknown": {"model_type": "gpt2"},
        "other": {"intermediate_size": 64},
    }
    for name, change in changes.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({**config, **change}))
        Path(name, "model.safetensors").write_bytes(Path("source", "model.safetensors").read_bytes())
    capsys.readouterr()
    assert convert_checkpoint.main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not Path("new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
