"""Megatron's AdamW and learning-rate schedule from the configuration."""

import math
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mpo_megatron.config import OptimConfig

_HYPER_PARAMETERS = ("lr", "max_lr", "min_lr", "betas", "eps")
_DECAY_STYLES = {"CosineAnnealing": "cosine", "Linear": "linear", "Constant": "constant"}


def build_optimizer(chunks: list[Any], optim: OptimConfig, clip: float, dtype: torch.dtype) -> Any:
    """AdamW through Megatron: (distributed) optimizer with float32 master weights where the model is bf16.

    Args:
        chunks: as `wrap_data_parallel` gives them.
    """
    replicas = chunks[0].ddp_config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=replicas.use_distributed_optimizer,
            overlap_param_gather=replicas.overlap_param_gather,
        ),
        chunks,
    )
    for wrapper in _around_torch_adam(optimizer):
        _complete_adam_state(wrapper)
        # One pass over parameters and state, not one for each operation.
        for group in wrapper.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def _around_torch_adam(optimizer: Any) -> list[Any]:
    """Megatron's wrappers around plain torch Adams: none where Transformer Engine's or apex's fused Adam is used."""
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    return [w for w in wrappers if isinstance(w.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _complete_adam_state(wrapper: Any) -> None:
    """Make Megatron's checkpoints work with torch's Adam, which keeps a `step` tensor for each parameter.

    They expect that state to be there when they are saved before the first step or loaded into an optimizer that has
    not stepped, and the distributed optimizer forgets `step`, which it restores elsewhere, when it copies state back.
    """
    state = wrapper.optimizer.state
    for group in wrapper.optimizer.param_groups:
        for parameter in group["params"]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            # The fused kernel of a GPU reads it there, and torch checks no device.
            state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    if hasattr(wrapper, "_set_main_param_and_optimizer_states"):
        set_states = wrapper._set_main_param_and_optimizer_states

        def set_states_and_step(parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
            steps = {"step": next(iter(wrapper.optimizer.state.values()))["step"]}
            set_states(parameter, steps | tensors)

        wrapper._set_main_param_and_optimizer_states = set_states_and_step


def load_optimizer(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Fill a Megatron optimizer from its loaded state, plain torch Adam's `step` included.

    Megatron leaves the common step out of a checkpoint where it is 0, and the distributed optimizer gives all
    parameters one and the same `step` tensor, which each of them would then count up.
    """
    adams = _around_torch_adam(optimizer)
    present = optimizer.param_groups[0]
    # Where there are experts, Megatron has two optimizers in one, theirs the second.
    for part in loaded.values() if 0 in loaded else [loaded]:
        inner = part.get("optimizer", part)
        # The run's own hyper-parameters, not those that it was saved with: Megatron keeps both in the parameter groups.
        for group in inner["param_groups"]:
            group.update({key: present[key] for key in _HYPER_PARAMETERS if key in group and key in present})
            # What torch's Adam has no word for and Transformer Engine's has, or the other way.
            group.update({key: present[key] for key in present.keys() - group.keys() - {"params"}})
        if adams and "state" in inner:
            inner["state"].setdefault("common_step", torch.tensor(0.0))
    optimizer.load_state_dict(loaded)
    for wrapper in adams:
        for parameter, state in wrapper.optimizer.state.items():
            state["step"] = state["step"].to(parameter.device, copy=True)


def build_schedule(optimizer: Any, optim: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine, linear or no decay to `min_lr` at the end of the run.

    Megatron's schedule starts at `init_lr` on the first step; with w warm-up steps it is lr / (w + 1), so
    that no step is taken at a rate of 0.
    """
    sched = optim.sched
    warmup = (
        sched.warmup_steps if sched.warmup_steps is not None else math.ceil(sched.warmup_ratio * total_steps)
    )
    warmup = min(warmup, total_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr / (warmup + 1),
        max_lr=optim.lr,
        min_lr=sched.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=_DECAY_STYLES[sched.name],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its own configuration, from the saved step on
    )
