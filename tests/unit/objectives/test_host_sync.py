"""No objective has the host wait for a GPU, nor do the metrics; and the interceptor finds what would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpo_megatron.objectives import bind, get
from mpo_megatron.objectives.metrics import group_metrics
from tests.helpers.host_sync import watch
from tests.helpers.objectives import SETTINGS, random_batch

# Of every setting that chooses another way through an objective.
MORE: dict[str, dict[str, Any]] = {
    "wmpo, signed": {"beta": 0.1, "alpha": 0.3, "weighting": "signed"},
    "ipo, sums": {"beta": 0.1, "length_normalised": False},
    "rpo, forward": {"beta": 0.1, "eta": 0.7, "distance": "fwd_kl"},
    "rpo, squared": {"beta": 0.1, "eta": 0.7, "distance": "squared"},
    "grpo_offline, plain": {},
    **{f"simpo, {pairs}": {"beta": 2.0, "gamma": 0.5, "pairs": pairs} for pairs in ("best_random", "all", "cross")},
}  # fmt: skip


@pytest.mark.parametrize("case", [*SETTINGS, *MORE])
def test_objectives_and_metrics_wait_for_nothing(case: str) -> None:
    name = case.partition(",")[0]
    objective = bind(get(name), {**SETTINGS, **MORE}[case], sft_weight=0.0 if name == "sft" else 0.5)
    batch = random_batch(dtype=torch.float32)
    with watch() as found:
        result = objective(batch)
        result.losses.sum().backward()
        group_metrics(batch, result)
    assert found == []


class Waiting(torch.autograd.Function):
    """Reads a number in its backward pass."""

    @staticmethod
    def forward(ctx: object, values: torch.Tensor) -> torch.Tensor:
        return values.sum()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad.expand(6) * grad.item()


VALUES, FLAGS = torch.arange(6.0), torch.arange(6) > 2
COUNTS = torch.tensor([1, 2, 3])
WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: VALUES.sum().item(),
    "float": lambda: float(VALUES[0]),
    "int": lambda: int(COUNTS[0]),
    "if": lambda: 1 if FLAGS.any() else 0,
    "range": lambda: range(COUNTS[0]),
    "format": lambda: f"{VALUES[0]:.2f}",
    "tolist": lambda: VALUES.tolist(),
    "cpu": lambda: VALUES.cpu(),
    "to": lambda: VALUES.to("cpu"),
    "to a device": lambda: VALUES.to(device=torch.device("cpu")),
    "numpy": lambda: VALUES.numpy(),
    "mask": lambda: VALUES[FLAGS],
    "put at a mask": lambda: VALUES.clone().__setitem__(FLAGS, VALUES[3:]),
    "put a number": lambda: VALUES.clone().__setitem__(COUNTS, 3.0),
    "masked_select": lambda: VALUES.masked_select(FLAGS),
    "nonzero": lambda: FLAGS.nonzero(),
    "where alone": lambda: torch.where(FLAGS),
    "where with a number": lambda: VALUES.where(FLAGS, 0.0),
    "tensor": lambda: torch.tensor([1.0]),
    "as_tensor": lambda: torch.as_tensor([1.0]),
    "new_tensor": lambda: VALUES.new_tensor([1.0]),
    "from_numpy": lambda: torch.from_numpy(COUNTS.numpy()),
    "repeat_interleave": lambda: torch.repeat_interleave(COUNTS),
    "unique": lambda: VALUES.unique(),
    "unique_consecutive": lambda: VALUES.unique_consecutive(),
    "bincount": lambda: torch.bincount(COUNTS),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "allclose": lambda: torch.allclose(VALUES, VALUES),
    "tensor_split": lambda: VALUES.tensor_split(COUNTS),
    "segment_reduce": lambda: torch.segment_reduce(VALUES, "sum", lengths=COUNTS),
    "backward": lambda: Waiting.apply(VALUES.clone().requires_grad_()).backward(),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_found(what: str) -> None:
    with watch() as found:
        WAITS[what]()
    assert found
    assert "test_host_sync.py" in found[0].line


def test_what_does_not_wait_is_let_through() -> None:
    with watch() as found:
        VALUES[COUNTS].sum() * 3 + VALUES.masked_fill(FLAGS, 0).to(torch.float64)
        torch.repeat_interleave(COUNTS, output_size=6)
        VALUES.clone()[0] = 3.0
        torch.full((), 3, device="cpu")
        torch.segment_reduce(VALUES, "sum", lengths=COUNTS, unsafe=True)
    assert found == []
