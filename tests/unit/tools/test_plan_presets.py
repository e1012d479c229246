"""Every preset and variant: it is valid, fits, is stated as the planner has it, and is built at every rank."""

import pytest
import torch

from mpo_megatron.config import Config
from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import check_layout
from mpo_megatron.model.fp8 import Fp8, check_fp8
from mpo_megatron.model.provider import build_model
from mpo_megatron.planning.memory import GIB
from mpo_megatron.planning.parameters import stage_parameters
from mpo_megatron.planning.run import Run
from mpo_megatron.runtime.parallel import check_world
from mpo_megatron.training.setup import model_options, settle_objective
from tests.helpers.fake_ranks import as_rank
from tools.plan_presets import (
    CONF,
    PUBLISHED,
    TOO_MUCH,
    Variant,
    architecture,
    planned,
    search_layout,
    variants,
    written,
)

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")

ALL = list(variants())
LEARNING_RATES = {"mistral_7b": 1.5e-7}  # of the paper's Table 10; all others as its Llama-3-8B-Instruct


def layouts() -> dict[tuple[str, int, int, int], Run]:
    """The ways in which models are cut: data and context parallelism change nothing of what a rank builds."""
    found = {}
    for variant in ALL:
        run = planned(variant).run
        found[variant.preset, run.tp, run.pp, run.vpp] = run
    return found


def test_there_are_all() -> None:
    presets = {path.stem for path in CONF.glob("*.yaml")} - {"mpo_gpt"}
    assert presets == set(PUBLISHED)
    assert {path for path in (CONF / "layout").rglob("*") if path.is_file()} == {v.path for v in ALL}
    for preset in PUBLISHED:
        mine = [variant for variant in ALL if variant.preset == preset]
        machines = {(variant.gpu, variant.precision) for variant in mine}
        assert machines == {("a100_80gb", "bf16"), ("h100", "bf16"), ("h100", "fp8")}
        assert len({variant.nodes for variant in mine}) > 1


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_variant_is_valid(preset: str) -> None:
    for variant in (variant for variant in ALL if variant.preset == preset):
        for objective in ("mpo", "wmpo"):
            config = variant.config(f"objective={objective}")
            check(config, variant)
            assert config.model.mpo.objective == objective


def check(config: Config, variant: Variant) -> None:
    """As the main job checks a configuration before it builds the model, where `nodes` nodes run it."""
    model, a = config.model, architecture(variant.preset)
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    nodes, gpus = map(int, variant.nodes.split("x"))
    assert (config.trainer.num_nodes, config.trainer.devices) == (nodes, gpus)
    assert tp <= gpus
    settle_objective(config)
    check_world(nodes * gpus, tp, pp, model.context_parallel_size, 1)
    check_layout(
        a, tp=tp, pp=pp, vpp=model.virtual_pipeline_model_parallel_size or 1, max_length=model.data.max_length,
        sequence_parallel=config.sequence_parallel,
    )  # fmt: skip
    assert config.sequence_parallel == (tp > 1)
    assert (model.fp8 is not None) == (variant.precision == "fp8")
    if model.fp8 is not None:
        check_fp8(Fp8(model.fp8, model.fp8_recipe), a, tp)
    assert config.trainer.accelerator == "gpu"
    assert config.precision == "bf16"
    assert model.mpo.hyper_parameters["beta"] == 0.01
    assert model.optim.lr == LEARNING_RATES.get(variant.preset, 3e-7)
    assert (model.optim.sched.name, model.optim.sched.warmup_ratio) == ("CosineAnnealing", 0.01)
    assert (model.global_batch_size, config.trainer.max_epochs) == (128, 1)


@pytest.mark.parametrize("variant", ALL, ids=lambda v: f"{v.preset}-{v.path.stem}")
def test_every_variant_fits(variant: Variant) -> None:
    plan = planned(variant)
    assert plan.run.world == plan.target.machine.gpus
    assert plan.cost.typical_memory <= plan.cost.memory <= plan.target.capacity
    assert plan.target.capacity < 77 * GIB  # 85e9 bytes less 3 GiB
    full = plan.run.recompute.granularity is not None
    assert full == (variant.preset.endswith("32b") and variant.nodes == "1x8")


def test_what_is_written_is_what_the_planner_says() -> None:
    """If this fails: python tools/plan_presets.py"""
    for path, text in written().items():
        assert path.read_text(encoding="utf-8") == text, path


@pytest.mark.parametrize(
    "variant",
    [Variant("qwen2_5_32b", "a100_80gb", "1x8", "bf16"), Variant("mistral_7b", "h100", "1x8", "fp8")],
    ids=lambda v: v.preset,
)
def test_layouts_are_those_of_the_search(variant: Variant) -> None:
    """Of two that are searched soon. If this fails: python tools/plan_presets.py --search"""
    assert search_layout(variant) == planned(variant).run


@pytest.mark.parametrize("choices", sorted(TOO_MUCH))
def test_what_is_left_out_does_not_fit(choices: tuple[str, str, str]) -> None:
    preset, nodes, precision = choices
    variant = Variant(preset, "h100", nodes, precision)
    with pytest.raises(ConfigError, match="no layout fits 8 x H100 SXM"):
        search_layout(variant)
    with pytest.raises(
        ConfigError, match=f"{preset} has no layout for gpu=h100 nodes=1x8 precision=fp8; choose"
    ):
        variant.config()


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_every_rank_is_built(layout: tuple[str, int, int, int]) -> None:
    """On the meta device, with as many parameters as the planner counts; Megatron's layers, as Transformer Engine's are
    the GPU's, without FP8, which changes no parameter.
    """
    preset, tp, pp, vpp = layout
    a, run = architecture(preset), layouts()[layout]
    variant = next(v for v in ALL if v.preset == preset and planned(v).run == run)
    options = model_options(variant.config("model.fp8=null"), torch.device("cpu"))
    for rank in range(tp * pp):
        with as_rank(rank, tp, pp, vpp) as place, torch.device("meta"):
            chunks = build_model(a, place, options)
        counted = [sum(p.numel() for p in chunk.parameters()) for chunk in chunks]
        assert counted == [stage.count for stage in stage_parameters(a, run, place.pp_rank)]
