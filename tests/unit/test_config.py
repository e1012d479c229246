"""The schema: defaults, overrides, and one sentence for each thing that is wrong."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from mpo_megatron.config import Config, as_yaml, changed, check_overrides, parse
from mpo_megatron.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"


def raw(*overrides: str) -> DictConfig:
    base = OmegaConf.create({"model": {"restore_from_path": "m", "data": {"train": "d.jsonl"}}})
    for override in overrides:
        key, value = override.split("=", 1)
        OmegaConf.update(base, key, yaml.safe_load(value), force_add=True)
    return base


def test_the_main_yaml_parses_and_repeats_no_default() -> None:
    main = OmegaConf.load(CONF / "mpo_gpt.yaml")
    assert isinstance(main, DictConfig)
    main.pop("defaults")
    config = parse(main)
    assert config.model.mpo.objective == "wmpo"
    assert config.model.optim.lr == pytest.approx(main.model.optim.lr)
    assert config.exp_manager["name"] == "mpo_gpt"


def test_the_result_is_frozen() -> None:
    config = parse(raw())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.mpo.sft_weight = 3.0  # type: ignore[misc]


def test_sequence_parallelism_comes_with_tensor_parallelism() -> None:
    assert not parse(raw()).sequence_parallel
    assert parse(raw("model.tensor_model_parallel_size=2")).sequence_parallel
    assert not parse(
        raw("model.tensor_model_parallel_size=2", "model.sequence_parallel=false")
    ).sequence_parallel


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.data.beta=1", "unknown key model.data.beta; known keys are"),
        ("modl.x=1", "unknown key modl; did you mean model?"),
        ("model.data.zzz=1", "unknown key model.data.zzz; known keys are"),
        ("model.mpo.reference=online", "model.mpo.reference=online is not known; choose one of cached, none"),
        ("model.mpo.sft_weight=-1", "model.mpo.sft_weight=-1.0 must be 0 or more"),
        (
            "trainer.max_steps=soon",
            "trainer.max_steps: Value 'soon' of type 'str' could not be converted to Integer",
        ),
        ("trainer.max_steps=0", "trainer.max_steps=0 must be 1 or more"),
        (f"model.data.train=a/{'é' * 128}/b", "has a name of more than 255 bytes, which no file can have"),
        (f"trainer.max_steps={-(10**400)}", "trainer.max_steps is a whole number beyond 1.8e308"),
        (f"model.optim.lr={10**400}", "model.optim.lr is a whole number beyond 1.8e308"),
        ("trainer.precision=fp8", "trainer.precision=fp8 is not known; choose one of bf16, 32"),
        ("trainer.val_check_interval=2.5", "must be a whole number of steps"),
        (
            "model.virtual_pipeline_model_parallel_size=2",
            "virtual_pipeline_model_parallel_size=2 interleaves the stages of a pipeline and needs",
        ),
        (
            "model.num_layers_in_first_pipeline_stage=7",
            "model.num_layers_in_first_pipeline_stage=7 is for one stage of a pipeline and needs "
            "pipeline_model_parallel_size > 1; raise it or remove num_layers_in_first_pipeline_stage",
        ),
        (
            "model.num_layers_in_last_pipeline_stage=7",
            "model.num_layers_in_last_pipeline_stage=7 is for one stage of a pipeline and needs",
        ),
        (
            "model.num_layers_in_first_pipeline_stage=0",
            "model.num_layers_in_first_pipeline_stage=0 must be 1 or more",
        ),
        (
            "model.num_layers_in_last_pipeline_stage=-1",
            "model.num_layers_in_last_pipeline_stage=-1 must be 1 or more",
        ),
        ("model.context_parallel_size=0", "model.context_parallel_size=0 must be 1 or more"),
        ("model.expert_model_parallel_size=0", "model.expert_model_parallel_size=0 must be 1 or more"),
        ("model.sequence_parallel=true", "needs tensor_model_parallel_size > 1"),
        ("model.data.max_length=100", "leaves no room for a response"),
        ("model.data.train=???", "model.data.train has no value"),
        (
            ["model.fp8=hybrid", "trainer.precision=32"],
            "model.fp8=hybrid casts the operands of a bf16 model; set trainer.precision=bf16",
        ),
        ("model.fp8=int8", "choose one of hybrid, e4m3"),
        ("model.fp8_recipe=current", "choose one of delayed, tensorwise, blockwise, mxfp8"),
        (
            "model.num_layers_at_end_in_bf16=1",
            "says which layers FP8 leaves alone, and model.fp8 is off; remove it",
        ),
        (
            [
                "model.fp8=e4m3",
                "trainer.precision=bf16",
                "model.fp8_recipe=delayed",
                "model.num_layers_at_start_in_bf16=1",
            ],
            "goes with any recipe but delayed",
        ),
        ("model.optim.master_weights=dithered", "choose one of auto, rounded"),
        (
            ["model.optim.overlap_param_gather=true", "model.optim.distributed=false"],
            "overlap_param_gather=true is of the distributed optimizer",
        ),
        (
            ["model.optim.overlap_param_gather=true", "model.optim.overlap_grad_reduce=false"],
            "takes the buckets of model.optim.overlap_grad_reduce, which is false; remove one",
        ),
        (
            ["model.export_at_save=true", "trainer.save_at_end=false"],
            "there will be none; set trainer.save_interval",
        ),
        (
            "trainer.checkpoint.monitor=val_loss",
            "choose one of loss, reward_margin, accuracy, preferred_reward",
        ),
        ("trainer.checkpoint.mode=best", "choose one of min, max"),
        ("trainer.checkpoint.save_top_k=0", "trainer.checkpoint.save_top_k=0 must be 1 or more"),
        ("trainer.checkpoint.most_recent_k=-2", "must be 1 or more"),
        (
            ["trainer.checkpoint.save_top_k=2", "model.data.validation=null"],
            "and model.data.validation is null; give it, or keep the newest with",
        ),
        (
            "exp_manager.checkpoint_callback_params.save_top_k=3",
            "set trainer.save_interval, and trainer.checkpoint.save_top_k, .monitor and .mode",
        ),
        ("trainer.heartbeat_timeout_minutes=-1", "trainer.heartbeat_timeout_minutes=-1.0 must be 0 or more"),
        ("model.data.prefetch_factor=-1", "model.data.prefetch_factor=-1 must be 0 or more"),
        ("model.profile.start_step=0", "model.profile.start_step=0 must be 1 or more"),
        ("model.nsys_profile.end_step=9", "model.nsys_profile.end_step=9 must be 10 or more"),
        ("model.profile.ranks=[]", "model.profile.ranks=[] must name one rank or more"),
        (
            ["model.profile.enabled=true", "model.nsys_profile.enabled=true"],
            "are both enabled, and a GPU reports to one profiler at a time",
        ),
        ("model.restore_from_path=???", "model.restore_from_path has no value"),
        ("model.optim.betas=[0.9,1.0]", "must be in [0, 1)"),
        ("model.optim.sched.min_lr=1", "is above model.optim.lr"),
        (
            "model.activations_checkpoint_granularity=full",
            "model.activations_checkpoint_method=None is not known",
        ),
    ],
)
def test_each_wrong_value_is_one_sentence(override: str | list[str], message: str) -> None:
    overrides = [override] if isinstance(override, str) else override
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse(raw(*overrides))
    assert "\n" not in str(caught.value)


def test_all_required_keys_without_a_value_are_named_at_once() -> None:
    for nothing in (OmegaConf.create({}), OmegaConf.create({"model": {"restore_from_path": "???"}})):
        with pytest.raises(ConfigError) as caught:
            parse(nothing)
        assert str(caught.value) == (
            "model.restore_from_path and model.data.train have no value; set them in the YAML or as "
            "model.restore_from_path=... model.data.train=..."
        )


def test_overrides_are_checked_before_hydra_sees_them() -> None:
    check_overrides(["model.mpo.beta=0.1", "exp_manager.wandb_logger_kwargs.name=x", "hydra.verbose=true"])
    with pytest.raises(
        ConfigError, match=r"unknown key model\.data\.trian; did you mean model\.data\.train\?"
    ):
        check_overrides(["model.data.trian=x"])
    with pytest.raises(ConfigError, match="cannot read the override"):
        check_overrides(["model.data.train=[a"])


def test_hyper_parameters_stand_beside_the_keys_of_the_section() -> None:
    config = parse(
        raw("model.mpo.objective=simpo", "model.mpo.beta=2", "model.mpo.gamma=0.5", "model.mpo.alpha=null")
    )
    assert config.model.mpo.objective == "simpo"
    assert config.model.mpo.hyper_parameters == {"beta": 2, "gamma": 0.5, "alpha": None}
    written = as_yaml(config)
    assert written["model"]["mpo"] == {
        "objective": "simpo", "sft_weight": 0.0, "partition": "mean", "reference": None,
        "reference_from_path": None, "reference_exact": True, "beta": 2, "gamma": 0.5, "alpha": None,
    }  # fmt: skip
    again = OmegaConf.create(yaml.safe_load(yaml.safe_dump(written)))
    assert isinstance(again, DictConfig)
    assert parse(again) == config


def test_what_a_configuration_changes_is_the_same_however_it_is_said() -> None:
    given = ["model.restore_from_path=x", "model.data.train=y", "trainer.max_steps=3", "model.mpo.beta=0.2"]
    found = changed(parse(raw(*given)))
    assert (found["trainer.max_steps"], found["model.mpo.beta"]) == ("3", "0.2")
    yaml = raw(*given[:2])
    OmegaConf.update(yaml, "trainer.max_steps", 3, force_add=True)
    OmegaConf.update(yaml, "model.mpo.beta", 0.2, force_add=True)
    assert changed(parse(yaml)) == found
    # A default that is given is no change.
    assert changed(parse(raw(*given, "trainer.log_val_groups=false"))) == found
    assert set(changed(parse(raw(*given, "trainer.log_val_groups=true"))).items() ^ found.items()) == {
        ("trainer.log_val_groups", "True")
    }


def test_every_field_of_the_schema_has_a_default_or_is_required() -> None:
    required = {"restore_from_path", "train"}
    for section in (Config(), Config().trainer, Config().model, Config().model.mpo, Config().model.data):
        for field in dataclasses.fields(section):
            assert (getattr(section, field.name) == "???") == (field.name in required), field.name


def test_what_overlaps_is_a_matter_of_the_device_until_it_is_said() -> None:
    from mpo_megatron.config import OptimConfig

    assert OptimConfig().overlap(on_gpus=True) == (True, True)
    assert OptimConfig().overlap(on_gpus=False) == (False, False)
    assert OptimConfig(distributed=False).overlap(on_gpus=True) == (True, False)
    assert OptimConfig(overlap_grad_reduce=False).overlap(on_gpus=True) == (False, False)
    assert OptimConfig(overlap_param_gather=True).overlap(on_gpus=False) == (True, True)
