"""The command that plans a run."""

from pathlib import Path

import pytest

from tests.helpers.models import make_llama
from tools.plan_run import main

ROOT = Path(__file__).resolve().parents[3]
QWEN = "layers=64,hidden=5120,ffn=27648,heads=40,kv_heads=8,vocab=152064,family=qwen2"
BF16 = "trainer.precision=bf16"


def test_a_plan_of_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sizes", QWEN, "--prompt", "512", "--responses", "300,700", "--n", "8", "--gpus", "16"]
    layout = ["model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=4"]
    assert main([*arguments, *layout]) == 0
    printed = capsys.readouterr().out
    # As published: 32,763,876,352 parameters; four stages of four ranks.
    assert "32.76B parameters" in printed
    assert "16 x H100 SXM, TP4 PP4" in printed
    for word in ("optimizer", "activations", "TP all-gather", "PP send", "% MFU", "groups/s", "bubble"):
        assert word in printed


def test_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sizes", QWEN, "--prompt", "512", "--gpus", "16", "--search", "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert "layouts fit 16 x H100 SXM" in printed
    assert "those that do not fit" in printed
    assert len(printed.splitlines()) < 30


def test_lengths_from_data_of_a_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_llama(tmp_path / "model", max_position_embeddings=2048)
    arguments = ["--config", str(ROOT / "conf" / "mpo_gpt.yaml"), "--model", str(model), "--gpus", "2"]
    data = [
        f"model.data.train={ROOT / 'examples' / 'data' / 'validation.jsonl'}",
        f"model.data.cache_dir={tmp_path}",
    ]
    lengths = [
        "model.data.max_length=2048",
        "model.data.max_prompt_length=1024",
        "model.max_tokens_per_micro_batch=8192",
    ]
    assert main([*arguments, *data, *lengths]) == 0
    printed = capsys.readouterr().out
    assert "8 groups, 4.0 responses each" in printed
    assert "no peak of float32 products" in printed
    assert main([*arguments, *data, *lengths, BF16]) == 0
    assert "groups/s" in capsys.readouterr().out
    # What is trained on is selected, as in the job.
    assert main([*arguments, *data, *lengths, "model.data.keep_best=1", "model.data.keep_worst=1"]) == 0
    assert "8 groups, 2.0 responses each" in capsys.readouterr().out


def test_a_model_is_its_folder_or_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_llama(tmp_path / "model", max_position_embeddings=2048)
    for path in (model, model / "config.json"):
        assert main(["--model", str(path), "--prompt", "9", "--gpus", "1"]) == 0
    first, second = capsys.readouterr().out.split("model  ")[1:]
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "layers=2"], "--sizes has no hidden, ffn, heads, kv_heads, vocab; it takes layers"),
        (["--sizes", QWEN + ",width=3"], "--sizes has width; it takes"),
        (["--sizes", QWEN.replace("64", "many")], "sizes are whole numbers"),
        (["--sizes", QWEN, "--gpu", "T4"], "GPU 'T4' is not in the table"),
        (["--sizes", QWEN, "--responses", "a"], "--responses a: give whole numbers"),
        (
            ["--sizes", QWEN, "--gpus", "3", "model.tensor_model_parallel_size=2"],
            "3 ranks cannot be cut into models",
        ),
        (
            ["--sizes", QWEN, "model.pipeline_model_parallel_size=5", "--gpus", "5"],
            "does not divide the model's 64",
        ),
        (["--sizes", QWEN, "model.tensor_parallel=5"], "unknown key model.tensor_parallel"),
        (["--sizes", QWEN, "--search", "trainer.precision=32"], "the search ranks by peaks of bf16"),
        (["--sizes", QWEN, "--gpu", "A100", "model.fp8=hybrid"], "A100 SXM has no FP8 products"),
        (["--config", "absent.yaml"], "there is no absent.yaml in"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if "--config" in arguments else ["--prompt", "512"]
    assert main([*arguments, *prompt]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
