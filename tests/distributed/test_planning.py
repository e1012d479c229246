"""The planner against real steps on CPU ranks: bytes that autograd keeps, and FLOPs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import Layout
from tests.distributed.planned import (
    Lengths,
    flops_of_a_step,
    saved_as_on_a_gpu,
    saved_by_a_step,
    traffic_of_a_step,
)
from tests.helpers.models import make_model

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 1024}
PAIRS = Lengths(prompt=61, responses=(47, 33), groups=4)
EIGHT = Lengths(prompt=61, responses=(47, 33, 21, 52, 40, 18, 29, 35), groups=4)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FULL_2 = FULL | {"recompute_num_layers": 2}
BLOCK = FULL | {"recompute_method": "block"}
SELECTIVE = {"recompute_granularity": "selective"}
TE: dict[str, Any] = {"transformer_engine": True}
BF16 = torch.bfloat16
# World size, family, groups, layout. Every row holds one group of eight, or two pairs.
CASES: dict[str, tuple[int, str, Lengths, Layout]] = {
    "pairs": (1, "llama", PAIRS, Layout(max_tokens=350)),
    "eight": (1, "llama", EIGHT, Layout(max_tokens=350)),
    "eight, prompts repeated": (1, "llama", EIGHT, Layout(max_tokens=800, shared_prompt=False)),
    "eight, bf16": (1, "llama", EIGHT, Layout(max_tokens=350, precision=BF16)),
    "pairs, selective": (1, "llama", PAIRS, Layout(max_tokens=350, options=SELECTIVE)),
    "eight, selective": (1, "llama", EIGHT, Layout(max_tokens=350, options=SELECTIVE)),
    "pairs, full": (1, "llama", PAIRS, Layout(max_tokens=350, options=FULL)),
    "eight, full": (1, "llama", EIGHT, Layout(max_tokens=350, options=FULL)),
    "eight, full by two": (1, "llama", EIGHT, Layout(max_tokens=350, options=FULL_2)),
    "eight, a block of one": (1, "llama", EIGHT, Layout(max_tokens=350, options=BLOCK)),
    "qwen2": (1, "qwen2", EIGHT, Layout(max_tokens=350)),
    "qwen3, bf16": (1, "qwen3", EIGHT, Layout(max_tokens=350, precision=BF16)),
    "qwen3_moe": (1, "qwen3_moe", EIGHT, Layout(max_tokens=350)),
    "tp2": (2, "llama", PAIRS, Layout(tp=2, max_tokens=350)),
    "tp2, eight, bf16, selective": (2, "llama", EIGHT, Layout(tp=2, max_tokens=350, precision=BF16, options=SELECTIVE)),
    "tp2, full": (2, "llama", EIGHT, Layout(tp=2, max_tokens=350, options=FULL)),
    "tp2, no sequence parallelism": (
        2, "llama", EIGHT, Layout(tp=2, max_tokens=350, options={"sequence_parallel": False}),
    ),
    "pp2": (2, "llama", PAIRS, Layout(pp=2, max_tokens=350)),
    "pp2, eight, selective": (2, "llama", EIGHT, Layout(pp=2, max_tokens=350, options=SELECTIVE)),
    "pp2, full": (2, "llama", EIGHT, Layout(pp=2, max_tokens=350, options=FULL)),
    "pp2 vpp2": (2, "llama", EIGHT, Layout(pp=2, vpp=2, max_tokens=350)),
    "cp2": (2, "llama", PAIRS, Layout(cp=2, max_tokens=350)),
    "cp2, eight, selective": (2, "llama", EIGHT, Layout(cp=2, max_tokens=350, options=SELECTIVE)),
    "cp2, full": (2, "llama", EIGHT, Layout(cp=2, max_tokens=350, options=FULL)),
}  # fmt: skip
TE_CASES: dict[str, tuple[int, str, Lengths, Layout]] = {
    "pairs": (1, "llama", PAIRS, Layout(max_tokens=350, options=TE)),
    "eight, bf16": (1, "llama", EIGHT, Layout(max_tokens=350, precision=BF16, options=TE)),
    "qwen3, bf16": (1, "qwen3", EIGHT, Layout(max_tokens=350, precision=BF16, options=TE)),
    "selective": (1, "llama", EIGHT, Layout(max_tokens=350, options=TE | SELECTIVE)),
    "full": (1, "llama", EIGHT, Layout(max_tokens=350, options=TE | FULL)),
    "tp2": (2, "llama", EIGHT, Layout(tp=2, max_tokens=350, options=TE)),
    "pp2": (2, "llama", EIGHT, Layout(pp=2, max_tokens=350, options=TE)),
    "cp2": (2, "llama", EIGHT, Layout(cp=2, max_tokens=350, options=TE)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a small model of a family."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            name, *untied = family.split()
            tied = not untied
            made[family] = make_model(tmp_path_factory.mktemp(name), name, tie_word_embeddings=tied, **SIZES)
        return made[family]

    return of


def check_activations(
    pool: Any, folder: Path, lengths: Lengths, layout: Layout, name: str, measure: Any = saved_by_a_step
) -> None:
    found = pool.run(measure, folder, lengths, layout)
    stages = [found[i :: layout.pp] for i in range(layout.pp)] if layout.pp > 1 else [found]
    for ranks in stages:
        # Context-parallel ranks hold other parts of a row: the planner's figure is that of the largest.
        measured = max(rank.measured for rank in ranks)
        planned = ranks[0].planned
        print(f"{name}: planned {planned:,.0f}, kept {measured:,.0f} bytes: {planned / measured - 1:+.1%}")
        assert planned == pytest.approx(measured, rel=0.1)
        assert all(rank.detail["left"] == 0 for rank in ranks)


@pytest.mark.parametrize("name", CASES)
def test_activations(name: str, ranks: Any, model: Any) -> None:
    world, family, lengths, layout = CASES[name]
    check_activations(ranks(world), model(family), lengths, layout, name)


@pytest.mark.parametrize("name", TE_CASES)
def test_activations_of_transformer_engine(name: str, te_ranks: Any, model: Any) -> None:
    world, family, lengths, layout = TE_CASES[name]
    check_activations(te_ranks(world), model(family), lengths, layout, name)


@pytest.mark.parametrize("name", TE_CASES)
def test_activations_as_on_a_gpu(name: str, te_ranks: Any, model: Any) -> None:
    """Transformer Engine's layers with `varlen` attention and a fused SwiGLU."""
    world, family, lengths, layout = TE_CASES[name]
    check_activations(te_ranks(world), model(family), lengths, layout, name, saved_as_on_a_gpu)


FLOPS = [
    "pairs",
    "eight",
    "eight, prompts repeated",
    "eight, selective",
    "eight, full",
    "eight, a block of one",
]
FLOPS += ["qwen3, bf16", "qwen3_moe", "tp2", "pp2, full", "pp2 vpp2", "cp2"]


@pytest.mark.parametrize("name", FLOPS)
def test_flops(name: str, ranks: Any, model: Any) -> None:
    """All that run, and attention's part alone, over all ranks."""
    world, family, lengths, layout = CASES[name]
    found = ranks(world).run(flops_of_a_step, model(family), lengths, layout)
    counted = sum(rank.measured for rank in found)
    planned = found[0].planned
    print(f"{name}: planned {planned:,.0f}, counted {counted:,.0f} FLOPs: {planned / counted - 1:+.2%}")
    assert all(rank.detail["attention"] > 0 for rank in found)
    assert planned == pytest.approx(counted, rel=0.02)
    assert found[0].detail["repeated"] > found[0].detail["shared"]


TRAFFIC: dict[str, tuple[int, str, Lengths, Layout]] = {
    name: CASES[name]
    for name in (
        "tp2", "tp2, full", "tp2, no sequence parallelism", "pp2", "pp2 vpp2", "cp2", "cp2, eight, selective",
        "cp2, full",
    )
} | {
    "dp2": (2, "llama", PAIRS, Layout(max_tokens=350)),
    "dp2, distributed optimizer, bf16": (
        2, "llama", PAIRS, Layout(max_tokens=350, precision=BF16, distributed_optimizer=True),
    ),
    "cp2, distributed optimizer": (2, "llama", PAIRS, Layout(cp=2, max_tokens=350, distributed_optimizer=True)),
    "pp2, untied, split groups": (2, "qwen2 untied", EIGHT, Layout(pp=2, max_tokens=200)),
    "tp2, qk norms, split groups": (2, "qwen3", EIGHT, Layout(tp=2, max_tokens=200)),
    "tp2 pp2 dp2": (8, "llama", PAIRS, Layout(tp=2, pp=2, max_tokens=350, distributed_optimizer=True)),
    "experts, dp2": (2, "qwen3_moe", PAIRS, Layout(max_tokens=350, distributed_optimizer=True)),
    "ep2": (2, "qwen3_moe", PAIRS, Layout(ep=2, max_tokens=350, distributed_optimizer=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAFFIC)
def test_communication(name: str, ranks: Any, model: Any) -> None:
    """Of every rank, by kind, to the byte."""
    world, family, lengths, layout = TRAFFIC[name]
    found = ranks(world).run(traffic_of_a_step, model(family), lengths, layout)
    if layout.ep > 1:
        # How many tokens a rank sends back is up to the experts' balance; over all ranks it is what was sent.
        for side in ("planned", "counted"):
            mean = sum(rank[side]["EP all-to-all"] for rank in found) / world
            for rank in found:
                rank[side]["EP all-to-all"] = mean
    for rank in found:
        assert rank["planned"], "a layout without communication says nothing"
        assert rank["counted"] == pytest.approx(rank["planned"])
    assert sum(rank["small"]["all"] for rank in found) < 0.01 * sum(
        sum(rank["counted"].values()) for rank in found
    )
    print(name, {kind: f"{size:,.0f}" for kind, size in sorted(found[0]["counted"].items())})
