"""A row of one long prompt and long responses: finite in bf16, and near the same row in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.jobs import Layout, build, gradients, logps
from tests.gpu.conftest import Place, on_cpu, on_gpu
from tests.helpers.models import make_llama

SCORES = np.array([3.0, 1.0, 2.0])


def passes(folder: Path, tokens: int, layouts: dict[str, Layout]) -> dict[str, dict[str, Any]]:
    """By name, log-probs [3] and gradient of a row: a prompt of so many tokens, responses of as many, 1 and half."""
    from mpo_megatron.data import GroupList, TokenizedGroup

    found = {}
    for name, layout in layouts.items():
        model = build(folder, [2], layout)
        random = np.random.default_rng(0)
        prompt, *responses = (
            random.integers(0, model.architecture.vocab_size, n) for n in (tokens, tokens, 1, tokens // 2)
        )
        group = TokenizedGroup("long", prompt, list(responses), SCORES, SCORES > 2.5)
        model.source.dataset = GroupList([group])
        reference = logps(model)
        values = gradients(model, reference + torch.tensor([-1.0, 0.0, 1.0], device=reference.device), "wmpo")
        own = torch.cat([p.main_grad.flatten() for chunk in model.chunks for p in chunk.parameters()])
        found[name] = {"logps": reference.cpu(), "loss": values["loss"], "gradient": own.cpu()}
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(
        tmp_path_factory.mktemp("model"),
        num_hidden_layers=2,
        num_key_value_heads=4,  # of each query head: in float32 too there is a kernel that stores no scores
        hidden_size=256,
        head_dim=64,
        intermediate_size=512,
        initializer_range=0.05,
        max_position_embeddings=32768,
    )


@pytest.mark.parametrize(
    ("place", "kind", "backend"),
    [on_cpu("local", "sdpa"), on_gpu("local", "varlen"), on_gpu("te", "varlen"), on_gpu("te", "te")],
    indirect=["place"],
)
def test_nothing_overflows(kind: str, backend: str, place: Place, model: Path, measured: Any) -> None:
    if kind == "te":
        place.needs_library("transformer_engine")
    place.needs_attention(backend)
    tokens = 8192 if place.is_gpu else 256
    common: dict[str, Any] = {"accelerator": place.accelerator, "max_tokens": 3 * tokens}
    layouts = {
        "float32": Layout(options={"head_chunk_size": 1024}, **common),
        "bf16": Layout(
            options={
                "transformer_engine": kind == "te",
                "attention_backend": backend,
                "head_chunk_size": 1024,
            },
            precision=torch.bfloat16,
            **common,
        ),
    }
    (found,) = place.ranks(1).run(passes, model, tokens, layouts, timeout=280)
    wanted, ours = found["float32"], found["bf16"]
    assert bool(ours["logps"].isfinite().all())
    assert bool(ours["gradient"].isfinite().all())
    assert bool((ours["logps"] < 0).all())
    measured("log-probs, relative", float((ours["logps"] / wanted["logps"] - 1).abs().max()), at_most=0.02)
    off = (ours["gradient"] - wanted["gradient"]).norm() / wanted["gradient"].norm()
    measured("gradient", float(off), at_most=0.1)
