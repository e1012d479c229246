"""Groups of settings: chosen on the command line, refused in one sentence, also through the main job's own command."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mpo_megatron.config.groups import Yaml, compose_config, groups
from mpo_megatron.errors import ConfigError
from mpo_megatron.runtime.commands import JOB, ROOT
from tests.helpers.warm import WarmPython

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
    assert groups(Yaml.at(ROOT / "conf" / "mpo_gpt.yaml")) == {}
    assert list(groups(Yaml.at(PRESET))) == ["recipe", "gpu", "nodes", "precision", "objective", "layout"]


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
        (PRESET, "fp8", "cannot read the override 'fp8'; write key=value, and in quotes a value with spaces"),
        (
            PRESET,
            "model.global_batch_size=all",
            "model.global_batch_size=all: Value 'all' of type 'str' could not be converted to Integer",
        ),
        (PRESET, f"model.mpo.beta=1{'0' * 400}", "model.mpo.beta is a whole number beyond 1.8e308"),
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
        ("defaults: [base]", "my.yaml: defaults has 'base', and there is no base.yaml in "),
        ("defaults: [my]", "my.yaml: its defaults take "),
        ("defaults: [turn]", "my.yaml: its defaults take "),
        (
            "defaults: [schema, gpu: h100, gpu: h100, _self_]",
            "my.yaml: gpu appears more than once in the final",
        ),
        ("defaults: [schema, override gpu: h100, _self_]", "my.yaml: In 'my': Could not override 'gpu'."),
        (
            "model: {mpo: {beta: 1" + "0" * 400 + "}}",
            "my.yaml: model.mpo.beta is a whole number beyond 1.8e308",
        ),
        ("model: {mpo: {beta: [1, 1" + "0" * 400 + "]}}", "my.yaml: model.mpo.beta is a whole number beyond"),
        ("defaults: [" + "a" * 300 + "]", "which no file can be called"),
        (r'defaults: ["a\0"]', r"my.yaml: defaults has 'a\x00', which no file can be called"),
        (r'defaults: ["\uD83D"]', r"my.yaml: defaults has '\ud83d', which no file can be called"),
        ("defaults: [broken]", "broken.yaml cannot be read: while parsing"),
        ("defaults: [gpu: [a]]", "my.yaml: defaults has gpu: ['a']; give the name of one of its files"),
        ("defaults: [tpu: v5]", "has no group of settings tpu; remove tpu=v5"),
        ("defaults: [schema, gpu: b, _self_]", "b.yaml cannot be read: while parsing"),
        (
            "defaults: [schema, _self_]\ntrainer: {max_steps: a}",
            "Value 'a' of type 'str' could not be converted to Integer",
        ),
        ("defaults: [mpo_gpt]\nmodle: {seed: 1}", "my.yaml: unknown key modle; did you mean model?"),
        ("model: {optim: {lrr: 1}}", "my.yaml: unknown key model.optim.lrr; did you mean model.optim.lr?"),
    ],
)
def test_a_yaml_that_is_not_as_it_must_be_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(text.encode("latin-1"))
    (tmp_path / "gpu").mkdir()
    for broken in (tmp_path / "gpu" / "b.yaml", tmp_path / "broken.yaml"):
        broken.write_text("model: {")
    (tmp_path / "turn.yaml").write_text("defaults: [my]")
    with pytest.raises(ConfigError) as caught:
        compose_config(tmp_path / "my.yaml", [])
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


MainJob = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def main_job(warm_python: WarmPython) -> MainJob:
    command = [str(warm_python.python), str(JOB), "--config-name", "llama3_8b"]
    environment = {**os.environ, **warm_python.environment}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment
        )

    return run


def test_the_main_job_takes_a_choice_and_asks_for_what_is_missing(main_job: MainJob) -> None:
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


def own_yaml(folder: Path) -> Path:
    """A user's YAML outside of the checkout: of a preset another GPU, and a GPU of the user's own for the command."""
    (folder / "gpu").mkdir(parents=True)
    (folder / "gpu" / "h800.yaml").write_text(
        "# @package _global_\nmodel: {max_tokens_per_micro_batch: 4096}\n"
    )
    yaml = folder / "my run.yaml"
    yaml.write_text(
        "defaults: [/llama3_8b, override /gpu: a100_80gb, _self_]\n"
        "model: {restore_from_path: m, data: {train: d}, optim: {lr: 1e-6}}\n"
    )
    return yaml


def test_a_yaml_of_ones_own_takes_a_preset_and_its_groups(tmp_path: Path) -> None:
    yaml = own_yaml(tmp_path / "it's mine, [all]")
    config = compose_config(yaml, [])
    assert config == compose_config(PRESET, ["gpu=a100_80gb", "model.optim.lr=1e-6", *GIVEN])
    chosen = compose_config(yaml, ["gpu=h100", "precision=fp8"])
    assert chosen == compose_config(PRESET, ["precision=fp8", "model.optim.lr=1e-6", *GIVEN])
    own = compose_config(yaml, ["gpu=h800", "layout=llama3_8b/h100_1x8_bf16"])
    assert own.model.max_tokens_per_micro_batch == 4096
    with pytest.raises(ConfigError, match="gpu=tpu is not known; choose one of a100_80gb, h100, h800"):
        compose_config(yaml, ["gpu=tpu"])


@pytest.mark.filterwarnings("error")
def test_a_yaml_without_self_comes_last(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "defaults: [mpo_gpt]\nmodel: {optim: {lr: 3e-6}}\nhydra: {verbose: true}\n"
    )
    assert compose_config(tmp_path / "my.yaml", []).model.optim.lr == 3e-6


def test_the_main_job_takes_a_yaml_of_ones_own(main_job: MainJob, tmp_path: Path) -> None:
    yaml = own_yaml(tmp_path)
    named = ["--config-dir", str(tmp_path), "--config-name", yaml.stem]
    shown = main_job(*named, "gpu=h100", "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "lr: 1.0e-06" in shown.stdout
    for arguments, message in (
        ([*named, "gpu=tpu"], "gpu=tpu is not known; choose one of a100_80gb, h100, h800"),
        (["--config-dir", str(tmp_path / "no")], f"there is no folder {tmp_path}/no to take YAMLs from"),
        (["--config-dir", str(tmp_path), "-cn", "you"], "there is no you.yaml in "),
        (["-cn", f"{tmp_path}/my"], f"--config-name {tmp_path}/my has a folder in it; give the folder as"),
        ([*named, "lr"], "cannot read the override 'lr'; write key=value"),
        ([*named, "--cfg", "job", "--resolve", "name=${no}"], "Interpolation key 'no' not found"),
        ([*named, "-m", "gpu=h100,a100_80gb"], "--multirun: a job trains one model"),
        ([*named, "--info", "--cfg", "job"], "Only one of --run, --multirun, --cfg, --info"),
        ([*named, "+model.optim.lr.a=3"], f"{yaml}: "),
    ):
        refused = main_job(*arguments)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].startswith(f"error: {message}")
        assert refused.stderr.count("error") == 1
        assert refused.stdout == ""
