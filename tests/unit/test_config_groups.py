"""Groups of settings: chosen on the command line, refused in one sentence, also through the main job's own command."""

import subprocess
import sys
from pathlib import Path

import pytest

from mpo_megatron.config.groups import compose_config, groups
from mpo_megatron.errors import ConfigError

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "conf" / "llama3_8b.yaml"
GIVEN = ["model.restore_from_path=m", "model.data.train=d"]


def test_a_command_chooses_of_each_group() -> None:
    default = compose_config(PRESET, GIVEN)
    assert (default.model.mpo.objective, default.model.fp8, default.trainer.num_nodes) == ("mpo", None, 1)
    chosen = compose_config(PRESET, ["objective=wmpo", "precision=fp8", "nodes=2x8", *GIVEN])
    assert chosen.model.mpo.objective == "wmpo"
    assert chosen.model.mpo.hyper_parameters == {"beta": 0.01, "alpha": 0.1}
    assert (chosen.model.fp8, chosen.trainer.num_nodes) == ("hybrid", 2)
    assert compose_config(PRESET, ["layout=llama3_8b/h100_1x8_fp8", *GIVEN]) != default
    more = compose_config(PRESET, ["nodes=8x8", "layout=llama3_8b/h100_2x8_bf16", *GIVEN])
    assert (more.trainer.num_nodes, more.model.pipeline_model_parallel_size) == (8, 2)
    assert compose_config(PRESET, ["~layout", *GIVEN]).model.tensor_model_parallel_size == 1


def test_a_yaml_without_groups_has_none() -> None:
    assert groups(ROOT / "conf" / "mpo_gpt.yaml") == {}
    assert list(groups(PRESET)) == ["recipe", "gpu", "nodes", "precision", "objective", "layout"]


@pytest.mark.parametrize(
    ("yaml", "override", "message"),
    [
        (PRESET, "gpu=h200", "gpu=h200 is not known; choose one of a100_80gb, h100"),
        (PRESET, "nodes=2", "nodes=2 is not known; choose one of 1x8, 2x8, 4x8, 8x8"),
        (PRESET, "nodes=8x8", "llama3_8b has no layout for gpu=h100 nodes=8x8 precision=bf16; choose gpu="),
        (PRESET, "gpu=a100_80gb precision=fp8", "llama3_8b has no layout for gpu=a100_80gb nodes=1x8 precision=fp8"),
        (PRESET, "layout=tp2", "layout=tp2 is not known; choose one of llama3_70b/"),
        (PRESET, "gpus=h100", "unknown key gpus; known keys are"),
        (PRESET, "model.fp8=[a", "cannot read the override"),
        (ROOT / "conf" / "mpo_gpt.yaml", "gpu=h100", "gpu=h100 chooses from a group of settings that mpo_gpt.yaml"),
        (ROOT / "conf" / "llama4.yaml", "gpu=h100", "there is no llama4.yaml in"),
        (PRESET, "trainer.precision=32", "model.restore_from_path and model.data.train have no value; set them in"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_one_sentence(yaml: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(yaml, override.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "my.yaml cannot be read: while parsing"),
        ("model: \xff", "my.yaml cannot be read: 'utf-8' codec can't decode byte"),
        ("model: ${", "my.yaml cannot be read: "),
        ("8", "my.yaml cannot be read: Invalid loaded object type: int"),
        ("'8'", "my.yaml must hold keys with their values, such as seed: 1"),
        ("[1, 2]", "my.yaml must hold keys with their values, not [1, 2]"),
        (
            "defaults: 3",
            "my.yaml: defaults must be a list of names and of groups with what to take, such as [schema,",
        ),
        ("defaults: [{}]", "defaults must be a list"),
        ("defaults: [base]", "my.yaml: In 'my': Could not load 'base'"),
        ("defaults: [" + "a" * 300 + "]", "which no file can be called"),
        (r'defaults: ["a\0"]', r"my.yaml: defaults has 'a\x00', which no file can be called"),
        (r'defaults: ["\uD83D"]', r"my.yaml: defaults has '\ud83d', which no file can be called"),
        ("defaults: [broken]", "broken.yaml cannot be read: while parsing"),
        ("defaults: [gpu: [a]]", "my.yaml: defaults has gpu: ['a']; give the name of one of its files"),
        ("defaults: [tpu: v5]", "has no group of settings tpu; remove tpu=v5"),
        ("defaults: [schema, gpu: b, _self_]", "b.yaml cannot be read: while parsing"),
        ("defaults: [schema, _self_]\ntrainer: {max_steps: a}", "my.yaml: "),
    ],
)
def test_a_yaml_that_is_not_as_it_must_be_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(text.encode("latin-1"))
    (tmp_path / "gpu").mkdir()
    for broken in (tmp_path / "gpu" / "b.yaml", tmp_path / "broken.yaml"):
        broken.write_text("model: {")
    with pytest.raises(ConfigError) as caught:
        compose_config(tmp_path / "my.yaml", [])
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def main_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "mpo_gpt.py"), "--config-name", "llama3_8b"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200, cwd=ROOT)


def test_the_main_job_takes_a_choice_and_asks_for_what_is_missing() -> None:
    shown = main_job("gpu=a100_80gb", "objective=wmpo", "nodes=2x8", "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "alpha: 0.1" in shown.stdout
    assert "num_nodes: 2" in shown.stdout
    asked = main_job("gpu=a100_80gb", "model.data.train=d.jsonl")
    assert asked.returncode == 1
    last = asked.stderr.splitlines()[-1]
    assert last == (
        "error: model.restore_from_path has no value; set it in the YAML or as model.restore_from_path=..."
    )
    assert "Traceback" not in asked.stderr
