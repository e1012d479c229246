"""The sizes at which people train: every tensor has its name, and the parameters are as many as published."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mpo_megatron.conversion.names import entries
from mpo_megatron.model.architecture import architecture_of

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_model_is_mapped(name: str) -> None:
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    architecture = architecture_of(config, name)
    with torch.device("meta"):
        theirs = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    ours = [source for entry in entries(architecture) for source in entry.hugging_face]
    assert sorted(ours) == sorted(theirs)
    assert architecture.num_parameters == PARAMETERS[name] == sum(p.numel() for p in theirs.values())
