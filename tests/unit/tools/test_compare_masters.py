"""The comparison of master weights: it runs, goes on where it stopped, and refuses what it cannot compare."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.benchmarks.masters import stochastic_rounding
from tests.helpers.main_job import write_data
from tests.helpers.models import make_llama
from tools.compare_masters import main


def test_stochastic_rounding_keeps_the_mean() -> None:
    values = torch.tensor([1.0, 1.5, -0.37, 2.0**-3 + 2.0**-13, 0.0, -3.14159])
    drawn = stochastic_rounding(values.repeat(100_000, 1), torch.Generator().manual_seed(0))
    unit = ((values.bfloat16().view(torch.int16) + 1).view(torch.bfloat16) - values.bfloat16()).abs().double()
    error = (drawn.double().mean(0) - values.double()).abs()
    assert bool((error <= 5 * unit / 2 / 100_000**0.5).all())
    on_the_grid = values == values.bfloat16().float()
    assert torch.equal(drawn[0, on_the_grid].float(), values[on_the_grid])
    assert all(len(column.unique()) == 2 for column in drawn[:, ~on_the_grid].T)


@pytest.mark.timeout(300)
def test_it_compares_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "output"
    command = [
        "--model", str(make_llama(tmp_path / "model", max_position_embeddings=512)), "--output", str(output),
        "--seeds", "1", "--rates", "1e-3", "--steps", "2", "--threads", "1",
    ]  # fmt: skip
    data = [
        f"model.data.train={write_data(tmp_path / 'train.jsonl', 16, 0)}",
        f"model.data.validation={write_data(tmp_path / 'validation.jsonl', 8, 1)}",
    ]
    assert main([*command, "--ways", "stochastic", *data]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["distance/stochastic/0.001"] > 0
    assert 0 < first["moved/stochastic/0.001"] < 1
    copied = load_file(output / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in copied.values()} == {torch.bfloat16}
    # The run that is there is taken as it is; only the other one is made.
    result = output / "runs" / "stochastic-lr0.001-seed1" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"reward_margin": 123.0}))
    assert main([*command, "--ways", "stochastic,float32", *data]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["reward_margin/stochastic/0.001"] == 123.0
    assert second["reward_margin/float32/0.001"] < 100
    assert second["settings"]["steps"] == 2
    assert "| 0.001 | float32 |" in (output / "masters.md").read_text()
    assert (output / "masters.png").stat().st_size > 10_000


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_llama(tmp_path / "model")
    empty, bf16 = tmp_path / "empty", make_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    empty.mkdir()
    for folder, message in ((empty, "has no model.safetensors"), (bf16, "does not hold float32 weights")):
        assert main(["--model", str(folder), "--output", str(tmp_path / "a")]) == 1
        assert message in capsys.readouterr().err
    failing = ["--model", str(model), "--output", str(tmp_path / "b"), "--seeds", "1", "--rates", "1e-3"]
    assert main([*failing, "--ways", "float32", "model.mpo.bta=1"]) == 1
    error = capsys.readouterr().err
    assert "unknown key model.mpo.bta; did you mean model.mpo.beta?" in error
    with pytest.raises(SystemExit):
        main([*failing, "--ways", "float23"])
    assert "choose of float32, rounded" in capsys.readouterr().err
