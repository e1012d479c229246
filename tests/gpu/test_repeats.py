"""One row, twenty times: the same log-probs to the last bit, which is what margins of exactly 0 rest on.

Gradients are compared and the largest difference noted: FlashAttention's backward pass adds in any order.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import Layout, build, gradients, logps
from tests.gpu.conftest import Place, on_cpu, on_gpu
from tests.helpers.models import make_llama

TIMES = 20


def repeats(folder: Path, wanted: Layout) -> dict[str, float]:
    """Of twenty passes over one row with the same weights, how far any is from the first.

    Returns:
        `log-probs` in nats, `gradient` relative, and `margin`, the largest reward margin of a step.
    """
    model = build(folder, [5], wanted)
    for chunk in model.chunks:
        chunk.train()
    found: dict[str, float] = {"log-probs": 0.0, "gradient": 0.0, "margin": 0.0}
    reference = logps(model)
    first: torch.Tensor | None = None
    for _ in range(TIMES):
        found["log-probs"] = max(found["log-probs"], float((logps(model) - reference).abs().max()))
        margin = gradients(model, reference, "wmpo")["reward_margin"]
        found["margin"] = max(found["margin"], abs(margin))
        own = torch.cat([p.main_grad.flatten() for chunk in model.chunks for p in chunk.parameters()])
        assert bool(own.isfinite().all())
        first = own.clone() if first is None else first
        found["gradient"] = max(found["gradient"], float((own - first).norm() / first.norm()))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(
        tmp_path_factory.mktemp("model"),
        hidden_size=256,
        intermediate_size=512,
        initializer_range=0.05,
        max_position_embeddings=4096,
    )


@pytest.mark.parametrize(
    ("place", "kind", "backend"),
    [on_cpu("local", "sdpa"), *(on_gpu(kind, name) for kind in ("local", "te") for name in ("sdpa", "varlen", "te"))],
    indirect=["place"],
)  # fmt: skip
def test_a_row_gives_the_same_numbers(
    kind: str, backend: str, place: Place, model: Path, measured: Any
) -> None:
    if kind == "te":
        place.needs_library("transformer_engine")
    place.needs_attention(backend)
    options = {"transformer_engine": kind == "te", "attention_backend": backend, "head_chunk_size": 512}
    layout = Layout(
        precision=torch.bfloat16,
        options=options,
        accelerator=place.accelerator,
        max_tokens=8192,
        longest=600 if place.is_gpu else 60,
    )
    (found,) = place.ranks(1).run(repeats, model, layout, timeout=280)
    measured("log-probs", found["log-probs"], at_most=0.0)
    measured("margin", found["margin"], at_most=0.0)
    measured("gradient", found["gradient"], at_most=0.0 if backend == "sdpa" and not place.is_gpu else 2**-6)
