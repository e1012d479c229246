"""What torch's Adam is given on a GPU; a tensor's device is all that this needs."""

from types import SimpleNamespace

import torch

from mpo_megatron.training.optimizer import _complete_adam_state, load_optimizer


def adam() -> torch.optim.AdamW:
    """On a device whose tensors have no values, which is not the CPU."""
    return torch.optim.AdamW([torch.nn.Parameter(torch.empty(3, device="meta"))], fused=True)


def devices(optimizer: torch.optim.Optimizer) -> set[str]:
    return {value.device.type for state in optimizer.state.values() for value in state.values()}


def test_the_step_is_where_the_parameter_is() -> None:
    """Its fused kernel reads the address, and a CPU's is no address of a GPU."""
    wrapper = SimpleNamespace(optimizer=adam())
    _complete_adam_state(wrapper)
    assert devices(wrapper.optimizer) == {"meta"}


def test_so_it_is_after_loading() -> None:
    """Checkpoints hold it once for all, on the CPU."""
    inner = adam()

    def load(loaded: dict) -> None:
        for parameter in inner.param_groups[0]["params"]:
            inner.state[parameter] = {"step": loaded["state"]["common_step"]}

    wrapper = SimpleNamespace(optimizer=inner, param_groups=inner.param_groups, load_state_dict=load)
    load_optimizer(wrapper, {"param_groups": [{}], "state": {}})
    assert devices(inner) == {"meta"}
