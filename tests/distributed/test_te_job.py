"""The main job on Transformer Engine's layers, in bf16 and with FP8: step 0, resume to the last bit, and its export.

Its own Python on CPU ranks (tests.helpers.transformer_engine). The only thing that the ranks are not asked is whether
there is a GPU.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.conversion.convert import export_checkpoint
from tests.distributed.faults import replaced
from tests.helpers.main_job import arguments, exact, job, job_killed_after, make_inputs, metrics
from tests.helpers.models import make_llama

JOB = ("trainer.precision=bf16", "trainer.accelerator=cpu", "model.transformer_impl=transformer_engine",
       "model.attention_backend=sdpa", "model.max_tokens_per_micro_batch=128", "trainer.max_steps=4")  # fmt: skip
TP2 = ["model.tensor_model_parallel_size=2"]
PP2 = ["model.pipeline_model_parallel_size=2"]


def on_te(run: Any, *given: Any) -> tuple[Any, str]:
    """(result, printed lines) of a run of the job in a rank that may take Transformer Engine's layers."""
    from mpo_megatron.model import attention, provider
    from mpo_megatron.training import setup

    def none_missing(device: torch.device, dtype: torch.dtype) -> None:
        return None

    def only_others_missing(name: str, *given: Any) -> str | None:
        return None if name == "te" else no_backend(name, *given)

    no_backend = attention.no_backend

    with (
        replaced(attention, "no_backend", only_others_missing),
        replaced(provider, "no_transformer_engine", none_missing),
        replaced(setup, "no_transformer_engine", none_missing),
        contextlib.redirect_stdout(io.StringIO()) as output,
    ):
        return run(*given), output.getvalue()


def allowing_pickles(run: Any, *given: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
        return run(*given)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose matrices are of 128 x 128 and more on each of two tensor-parallel ranks, as blocks need."""
    folder = tmp_path_factory.mktemp("inputs")
    changes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.05}
    model = make_llama(folder / "model", dtype=torch.bfloat16, max_position_embeddings=512, **changes)
    return make_inputs(folder, model)


@pytest.fixture(scope="module")
def local(inputs: dict[str, Path], ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank of Megatron's own layers does in bf16."""
    folder = tmp_path_factory.mktemp("local")
    more = [*JOB, "model.transformer_impl=local"]
    assert ranks(1).run(job, arguments(inputs, folder, *more), timeout=240) == [""]
    return folder


@pytest.mark.parametrize(
    ("world", "more"),
    [(1, []), (4, [*TP2, *PP2]), (4, [*TP2, "model.attention_backend=te"])],
    ids=["1", "tp2 pp2", "tp2 dp2, its attention"],
)
def test_bf16_trains_as_local_layers_do(
    world: int, more: list[str], inputs: dict[str, Path], local: Path, te_ranks: Any, tmp_path: Path
) -> None:
    results = te_ranks(world).run(on_te, job, arguments(inputs, tmp_path, *JOB, *more), timeout=240)
    assert [error for error, _ in results] == [""] * world
    assert "Transformer Engine layers" in results[0][1]
    ours, theirs = metrics(tmp_path), metrics(local)
    assert ours[0]["reward_margin"] == metrics(tmp_path, "validation")[0]["reward_margin"] == 0.0
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=0.05)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.02)
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.02


@pytest.mark.parametrize(
    ("recipe", "world", "more"),
    [
        ("tensorwise", 1, []),
        ("tensorwise", 4, [*TP2, *PP2]),
        ("blockwise", 2, TP2),
        ("delayed", 1, []),
        ("delayed", 2, PP2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_fp8_resumes_to_the_last_bit_and_exports(
    recipe: str,
    world: int,
    more: list[str],
    inputs: dict[str, Path],
    local: Path,
    te_ranks: Any,
    tmp_path: Path,
) -> None:
    """Scales of a tensor or block as it is have no past; delayed ones have, and it is in the checkpoint."""
    overrides = [*JOB, *more, "model.fp8=hybrid", f"model.fp8_recipe={recipe}", "trainer.save_interval=2",
                 "exp_manager.resume_if_exists=true"]  # fmt: skip
    straight, broken = (arguments(inputs, tmp_path / name, *overrides) for name in ("straight", "broken"))
    if recipe == "delayed":
        # So that both runs find a cached reference: a reference pass is part of the past, too.
        first = arguments(inputs, tmp_path / "first", *overrides)
        assert [e for e, _ in te_ranks(world).run(on_te, job, first, timeout=240)] == [""] * world
    results = te_ranks(world).run(on_te, job, straight, timeout=240)
    assert [error for error, _ in results] == [""] * world
    said = results[0][1]
    assert "fp8         FP8 hybrid, a scale of" in said
    stopped = te_ranks(world).run(on_te, job_killed_after, broken, 3, tmp_path / "lines", timeout=240)
    assert [result for result, _ in stopped] == ["stopped"] * world
    if recipe == "delayed":
        refused = te_ranks(world).run(on_te, job, broken, timeout=240)
        assert all(
            "only where NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1; set that if you" in e for e, _ in refused
        )
    resumed = te_ranks(world).run(allowing_pickles, on_te, job, broken, timeout=240)
    assert [error for error, _ in resumed] == [""] * world

    assert exact(tmp_path / "broken") == exact(tmp_path / "straight")
    theirs = metrics(tmp_path / "straight")
    delayed = recipe == "delayed"
    assert (theirs[0]["reward_margin"] != 0.0) == delayed
    assert ("margins at step 0 need not be exactly 0" in said) == delayed
    for a, b in zip(theirs, metrics(local), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.1)
    print(
        recipe, more, [f"{a['loss'] - b['loss']:+.3f}" for a, b in zip(theirs, metrics(local), strict=True)]
    )

    # The export is in bf16, complete, and that of the checkpoint.
    export_checkpoint(tmp_path / "broken" / "checkpoints" / "step_0000004", tmp_path / "later")
    folders = (tmp_path / "straight" / "hf", tmp_path / "broken" / "hf", tmp_path / "later", inputs["model"])
    end, again, later, start = (load_file(folder / "model.safetensors") for folder in folders)
    assert end.keys() == start.keys()
    for name, values in end.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, again[name])
        assert torch.equal(values, later[name])
        assert not torch.equal(values, start[name])
