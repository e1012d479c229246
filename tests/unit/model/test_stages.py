"""Layers of pipeline stages: the rule against Megatron's, and a fix in every refusal that is one."""

import itertools
import re

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from transformers import LlamaConfig

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import architecture_of
from mpo_megatron.model.provider import ModelOptions, transformer_config
from mpo_megatron.model.stages import FIRST, LAST, check_stages, stage_layers
from mpo_megatron.runtime.parallel import ParallelLayout

NUMBERS = (None, 1, 2, 3, 4, 5, 6)
CASES = list(itertools.product(range(1, 9), (2, 3, 4), (1, 2, 3), NUMBERS, NUMBERS))


def accepted(num_layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> bool:
    try:
        check_stages(num_layers, pp, vpp, first, last)
    except ConfigError:
        return False
    return True


def megatron_chunks(
    num_layers: int, pp: int, vpp: int, first: int | None, last: int | None
) -> list[list[list[int]]]:
    """Megatron's numbers of the layers in each chunk of each stage, from the configuration that we build."""
    architecture = architecture_of(
        LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=num_layers)
    )
    layout = ParallelLayout(0, pp, 0, 1, pp, vpp, 1, 1, 1, 0, 0, 0, 0, 0, torch.device("cpu"))
    options = ModelOptions(num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last)
    config = transformer_config(architecture, layout, options)
    stages = []
    for stage in range(pp):
        chunks = []
        for chunk in range(vpp):
            virtual = chunk if vpp > 1 else None
            offset = get_transformer_layer_offset(config, virtual, stage)
            chunks.append([*range(offset, offset + get_num_layers_to_build(config, virtual, stage))])
        stages.append(chunks)
    return stages


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ((30, 3), [10, 10, 10]),
        ((30, 4), []),
        ((30, 4, 7, 7), [7, 8, 8, 7]),
        ((30, 4, 6), [6, 8, 8, 8]),
        ((30, 4, None, 3), [9, 9, 9, 3]),
        ((5, 2, 2, 3), [2, 3]),
        ((5, 2, 2, 2), []),
        ((5, 2, 5), []),
        ((4, 3, 3, 3), []),
        ((4, 1), [4]),
    ],
)
def test_layers_of_each_stage(arguments: tuple, stages: list[int]) -> None:
    assert stage_layers(*arguments) == stages


def is_whole(stages: list[list[list[int]]], num_layers: int) -> bool:
    """Whether a micro-batch meets each layer once and in order, and no chunk is empty.

    It runs through the first chunk of every stage, then through the second of every stage.
    """
    order = [chunk for number in zip(*stages, strict=True) for chunk in number]
    return all(order) and [layer for chunk in order for layer in chunk] == list(range(num_layers))


def test_every_accepted_cut_gives_each_layer_to_one_chunk_in_order() -> None:
    cuts = [case for case in CASES if accepted(*case)]
    assert len(cuts) > 200
    assert any(pp == 2 and vpp > 1 and first and last for _, pp, vpp, first, last in cuts)
    for num_layers, pp, vpp, first, last in cuts:
        stages = megatron_chunks(num_layers, pp, vpp, first, last)
        assert is_whole(stages, num_layers), (num_layers, pp, vpp, first, last)
        assert [sum(map(len, chunks)) for chunks in stages] == stage_layers(num_layers, pp, first, last)


def test_no_cut_that_megatron_can_make_is_refused() -> None:
    for num_layers, pp, vpp, first, last in CASES:
        if accepted(num_layers, pp, vpp, first, last):
            continue
        if pp == 2 and first is not None and last is not None:
            continue  # Megatron is told the first alone
        try:
            stages = megatron_chunks(num_layers, pp, vpp, first, last)
        except (ValueError, AssertionError):
            continue
        assert not is_whole(stages, num_layers), (num_layers, pp, vpp, first, last)


def test_every_refusal_names_values_that_work() -> None:
    fixes = 0
    for num_layers, pp, vpp, first, last in CASES:
        try:
            check_stages(num_layers, pp, vpp, first, last)
        except ConfigError as error:
            message = str(error)
            assert "\n" not in message
            values = re.search(rf"set {FIRST}=(\d+) and {LAST}=(\d+)", message)
            if values:
                fixes += 1
                ends = tuple(map(int, values.groups()))
                divides = num_layers % vpp == 0 and num_layers >= pp * vpp
                assert accepted(num_layers, pp, vpp if divides else 1, *ends), message
            else:
                assert num_layers < pp or "virtual" in message, message
    assert fixes > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (30, 4),
            "model.pipeline_model_parallel_size=4 does not divide the model's 30 layers; set "
            "model.num_layers_in_first_pipeline_stage=7 and model.num_layers_in_last_pipeline_stage=7, or set "
            "model.pipeline_model_parallel_size to one of 1, 2, 3, 5, 6, 10, 15, 30",
        ),
        (
            (31, 2),
            "set model.num_layers_in_first_pipeline_stage=16 and model.num_layers_in_last_pipeline_stage=15, or",
        ),
        (
            (30, 4, 3),
            "set model.num_layers_in_first_pipeline_stage=6 and model.num_layers_in_last_pipeline_stage=6, or",
        ),
        (
            (2, 3),
            "model.pipeline_model_parallel_size=3 does not divide the model's 2 layers; there are fewer layers than "
            "stages, so set model.pipeline_model_parallel_size to 2 or less",
        ),
        (
            (30, 4, 1, 7),
            "model.num_layers_in_first_pipeline_stage=7 leaves 23 of the model's 30 layers for the 3 other pipeline "
            "stages, which must hold equally many and at least one; set",
        ),
        (
            (30, 4, 1, 7, 8),
            "model.num_layers_in_first_pipeline_stage=7 and model.num_layers_in_last_pipeline_stage=8 leave 15",
        ),
        (
            (32, 4, 1, 7, 8),
            "leave 17 of the model's 32 layers for the 2 other pipeline stages, which must hold equally many and at "
            "least one; set model.num_layers_in_first_pipeline_stage=8 and model.num_layers_in_last_pipeline_stage=8, "
            "or remove both for 8 layers on each stage",
        ),
        (
            (4, 2, 1, None, 9),
            "stage=9 leaves 0 of the model's 4 layers for the other pipeline stage, which must hold at least one; set",
        ),
        (
            (4, 2, 1, 2, 3),
            "model.num_layers_in_first_pipeline_stage=2 and model.num_layers_in_last_pipeline_stage=3 are all stages "
            "of model.pipeline_model_parallel_size=2 and must add up to the model's 4 layers; set",
        ),
        (
            (6, 2, 2),
            "model.virtual_pipeline_model_parallel_size=2 does not divide the 3 layers of a pipeline stage; use one "
            "of 1, 3, or set model.num_layers_in_first_pipeline_stage=4 and "
            "model.num_layers_in_last_pipeline_stage=2",
        ),
        (
            (30, 4, 2, 7, 7),
            "model.virtual_pipeline_model_parallel_size=2 does not divide the 7 or 8 layers of a pipeline stage; use "
            "1, or set model.num_layers_in_first_pipeline_stage=8 and model.num_layers_in_last_pipeline_stage=6",
        ),
    ],
)
def test_messages(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_stages(*arguments)
