"""Gradients summed and weights fetched while others are computed: who reads weights gets those of the last update."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.conversion.convert import export_checkpoint
from mpo_megatron.model.provider import unwrap
from tests.distributed.jobs import Layout, build, gradients, logps, save
from tests.helpers.main_job import arguments, job, metrics
from tests.helpers.models import make_model

SIZES = [2, 9, 3, 5]
ON = [f"model.optim.{name}=true" for name in ("overlap_grad_reduce", "overlap_param_gather", "distributed")]


def update_and_export(folder: Path, wanted: Layout, saved: Path, exported: Path) -> tuple[int, float, bool]:
    """An update, then the live model's export, and a checkpoint after another update.

    Returns:
        (buckets of this rank's model, part of its weights that are stale after the second update, whether they are the
        masters when they have been fetched)
    """
    from mpo_megatron.conversion.export import export_hf
    from mpo_megatron.training.data_parallel import current_models
    from mpo_megatron.training.masters import master_values

    model = build(folder, SIZES, wanted)
    reference = logps(model)
    for _ in range(2):
        gradients(model, reference, "wmpo")
        model.optimizer.step()
    parameters = [p for chunk in model.chunks for p in unwrap(chunk).parameters()]
    before = [p.detach().clone() for p in parameters]
    save(model, 2, saved, folder)
    models = current_models(model.chunks)
    export_hf(models, model.architecture, model.layout, source=folder, output=exported)
    masters = [master_values(p, model.optimizer).to(p.dtype) for p in parameters]
    equal = all(torch.equal(p, master) for p, master in zip(parameters, masters, strict=True))
    stale = sum(int((b != p).sum()) for b, p in zip(before, parameters, strict=True))
    groups = sum(len(c.bucket_groups + c.expert_parallel_bucket_groups) for c in model.chunks)
    return groups, stale / sum(p.numel() for p in parameters), equal


@pytest.mark.parametrize(
    ("world", "family", "layout"),
    [
        (2, "llama", Layout()),
        (4, "llama", Layout(tp=2, precision=torch.bfloat16)),
        (4, "llama", Layout(pp=2, vpp=2)),
        (4, "qwen3_moe", Layout(ep=2, precision=torch.bfloat16)),
    ],
    ids=["dp2", "tp2-dp2 in bf16", "dp2-pp2-vpp2", "ep2-dp2 in bf16"],
)
def test_exports_and_checkpoints_have_the_optimizers_weights(
    world: int, family: str, layout: Layout, ranks: Any, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "source", family)
    wanted = replace(layout, distributed_optimizer=True, overlap=True)
    found = ranks(world).run(update_and_export, folder, wanted, tmp_path / "saved", tmp_path / "live")
    assert sum(groups for groups, _, _ in found) > world * layout.vpp  # or nothing would overlap
    assert all(equal for _, _, equal in found)
    assert min(stale for _, stale, _ in found) > 0.01  # so that it makes a difference
    export_checkpoint(tmp_path / "saved" / "step_0000002", tmp_path / "exported")
    live, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "exported"))
    assert live.keys() == exported.keys()
    assert all(torch.equal(live[name], exported[name]) for name in live)


def test_the_main_job_is_the_same_in_bf16(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    """With validations, checkpoints and exports in between, and the count of the weights that moved."""
    more = ["trainer.precision=bf16", "trainer.max_steps=4", "trainer.val_check_interval=2",
            "trainer.save_interval=2", "model.export_at_save=true", "model.optim.lr=1e-4"]  # fmt: skip
    ways = {"on": ON, "off": ["model.optim.overlap_grad_reduce=false"]}
    for name, way in ways.items():
        assert ranks(2).run(job, arguments(inputs, tmp_path / name, *more, *way), timeout=240) == ["", ""]
    for split, keys in (("train", ("loss", "grad_norm", "moved_fraction")), ("validation", ("loss",))):
        ours, theirs = (metrics(tmp_path / name, split) for name in ways)
        assert len(ours) == len(theirs) > 2
        for one, other in zip(ours, theirs, strict=True):
            assert {key: one[key] for key in keys} == pytest.approx(
                {key: other[key] for key in keys}, rel=1e-4
            )
    assert all(line["moved_fraction"] > 0.01 for line in metrics(tmp_path / "on"))
    for path in ("hf", "exports/step_0000002"):
        ours, theirs = (load_file(tmp_path / name / path / "model.safetensors") for name in ways)
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
