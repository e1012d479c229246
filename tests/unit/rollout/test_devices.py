"""Where a process's model runs, and what a machine lacks for it."""

import pytest
import torch

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.devices import place


@pytest.mark.parametrize("device", [None, "cuda"])
def test_processes_take_the_gpus_in_turn(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert [place(device, 3, number) for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_device_that_is_named_is_taken() -> None:
    assert place("cpu", 1, 0) == "cpu"


@pytest.mark.parametrize("device", ["foo", "cuda:99", "mps"])
def test_what_is_not_there_is_one_sentence(device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device} cannot be used here \\(.*leave it out") as caught:
        place(device, 1, 0)
    assert "\n" not in str(caught.value)
