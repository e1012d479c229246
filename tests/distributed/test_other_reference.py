"""A reference that is not the starting model: `model.mpo.reference_from_path`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mpo_megatron.data import Selection, TokenizeOptions, build_dataset
from tests.helpers.main_job import arguments, job, make_inputs, metrics
from tests.helpers.models import hugging_face_logps, make_llama

BETA, BATCH, VALIDATION_STEPS = 0.3, 2, 3
# One step at a rate that changes no weight: the export has those that the run starts from.
SHORT = ("trainer.max_steps=1", "model.optim.lr=1e-30", "model.optim.weight_decay=0", "trainer.save_at_end=false",
         f"trainer.limit_val_batches={VALIDATION_STEPS}", f"model.global_batch_size={BATCH}",
         "trainer.val_check_interval=0", f"model.mpo.beta={BETA}", "model.mpo.objective=mpo",
         "model.mpo.alpha=null")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        **make_inputs(folder, groups=(8, 10)),
        "other": make_llama(folder / "other", seed=1, max_position_embeddings=512),
    }


@pytest.mark.parametrize("layout", ["model.tensor_model_parallel_size=2", "model.optim.distributed=true"])
def test_margins_are_those_of_both_models(
    layout: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """Before the first step, by their definition with log-probs of transformers; the starting weights are trained."""
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    dataset = build_dataset(
        inputs["validation"], tokenizer, TokenizeOptions(max_prompt_length=256, max_length=512),
        cache_dir=inputs["cache"], selection=Selection(),
    )  # fmt: skip
    groups = [dataset.group(i) for i in range(VALIDATION_STEPS * BATCH)]
    policy, reference = (
        hugging_face_logps(inputs[name], groups, torch.float64) for name in ("model", "other")
    )
    rewards = iter((BETA * (policy - reference)).tolist())
    margins = []
    for group in groups:
        own = np.array([next(rewards) for _ in group.response_ids])
        margins.append(own[group.preferred].mean() - own[~group.preferred].mean())

    overrides = arguments(
        inputs, tmp_path, *SHORT, layout, f"model.mpo.reference_from_path={inputs['other']}"
    )
    assert ranks(2).run(job, overrides, timeout=240) == ["", ""]
    before, after = metrics(tmp_path, "validation")
    # float32 sums of some hundred log-probs.
    assert before["reward_margin"] == pytest.approx(np.mean(margins), abs=2e-4)
    assert abs(before["reward_margin"]) > 0.05
    assert after["reward_margin"] == before["reward_margin"]
    start, end = (load_file(folder / "model.safetensors") for folder in (inputs["model"], tmp_path / "hf"))
    assert all(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.mpo.reference_from_path=/no"], "model.mpo.reference_from_path=/no: /no is neither a Hugging Face"),
        (["model.mpo.reference_from_path={small}"], "is a model of num_layers=2, and the trained one has num_layers=4"),
        (["model.mpo.reference_from_path={other}", "model.mpo.objective=sft", "model.mpo.beta=null"],
         "the objective sft reads no reference; remove it"),
        (["model.mpo.reference_from_path={other}", "model.export_path={other}"],
         "would replace model.mpo.reference_from_path="),
    ],
)  # fmt: skip
def test_what_can_be_no_reference_is_one_sentence(
    more: list[str], message: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    small = make_llama(tmp_path / "small", num_hidden_layers=2)
    given = [one.format(small=small, other=inputs["other"]) for one in more]
    (error,) = ranks(1).run(job, arguments(inputs, tmp_path / "run", *SHORT, *given))
    assert message in error
