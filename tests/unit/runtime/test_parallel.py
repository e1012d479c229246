"""How many ranks a layout needs, and how it is named."""

import re

import pytest
import torch

from mpo_megatron.errors import ConfigError
from mpo_megatron.runtime.parallel import ParallelLayout, check_tasks, check_world


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (8, 2, 1, 1, 4), (8, 2, 2, 2, 2), (8, 1, 1, 2, 8), (12, 2, 1, 2, 6)]
)
def test_experts_are_spread_over_context_and_data_parallel_ranks(sizes: tuple) -> None:
    check_world(*sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (6, 2, 2, 1, 1),
            "6 ranks cannot be cut into models of tensor 2 x pipeline 2 x context 1 = 4 ranks; start a multiple of 4",
        ),
        (
            (8, 2, 2, 1, 4),
            "model.expert_model_parallel_size=4 does not divide the 2 ranks of context x data parallelism "
            "(8 / tensor 2 / pipeline 2), which share a layer's experts; use one of 1, 2, or start more ranks",
        ),
        ((2, 2, 1, 1, 2), "does not divide the 1 rank of context x data parallelism"),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_one_sentence(sizes: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_world(*sizes)
    assert "\n" not in str(caught.value)


def test_a_layout_names_what_it_divides() -> None:
    layout = ParallelLayout(0, 8, 0, 2, 1, 1, 1, 4, 2, 0, 0, 0, 0, 0, torch.device("cpu"))
    assert str(layout) == "8 ranks (TP 2, DP 4, EP 2)"
    assert layout.sizes == (2, 1, 1, 1, 4, 2)


def test_tasks_of_slurm_are_no_ranks() -> None:
    check_tasks({})
    check_tasks({"SLURM_STEP_NUM_TASKS": "1"})
    check_tasks({"SLURM_STEP_NUM_TASKS": "2", "RANK": "0"})
    with pytest.raises(
        ConfigError, match="srun has started 16 tasks without torchrun, and each would train for"
    ):
        check_tasks({"SLURM_STEP_NUM_TASKS": "16"})
