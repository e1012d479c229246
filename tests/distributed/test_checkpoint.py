"""Checkpoints: a run that stops and resumes is the run that did not stop, at the same layout and at another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.errors import CheckpointError
from tests.distributed.jobs import Layout, build, gradients, logps
from tests.helpers.models import make_llama

SIZES = [3, 4, 2, 5]
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


def train(
    folder: Path, wanted: Layout, steps: int, resume: Path | None, save: Path | None
) -> tuple[torch.Tensor, float]:
    """Take steps from the start or from a checkpoint, save if asked. Returns log-probs and the learning rate."""
    from mpo_megatron.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

    model = build(folder, SIZES, wanted)
    reference, done = logps(model), 0
    if resume is not None:
        newest = latest_checkpoint(resume)
        assert newest is not None
        done = load_checkpoint(newest, model.chunks, model.optimizer, model.schedule, model.layout)
        assert newest.name == f"step_{done:07d}"
    for _ in range(steps):
        gradients(model, reference, "wmpo")
        model.optimizer.step()
        model.schedule.step(1)
    if save is not None:
        save_checkpoint(
            save,
            done + steps,
            model.chunks,
            model.optimizer,
            model.schedule,
            model.layout,
            {"config.yaml": "a: 1\n"},
            folder,
        )
    return logps(model), model.optimizer.param_groups[0]["lr"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def unbroken(folder: Path, ranks: Any) -> tuple[torch.Tensor, float]:
    return ranks(1).run(train, folder, Layout(), 4, None, None)[0]


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((1, Layout()), (1, Layout())),
        ((2, Layout(distributed_optimizer=True)), (2, Layout(distributed_optimizer=True))),
        ((2, Layout(tp=2)), (2, Layout(pp=2))),
        ((2, Layout(pp=2)), (1, Layout())),
        ((4, Layout(tp=2, distributed_optimizer=True)), (2, Layout(distributed_optimizer=True))),
        ((1, Layout()), (4, Layout(tp=2, pp=2))),
        ((2, Layout(pp=2, vpp=2)), (2, Layout(cp=2))),
        ((2, Layout(cp=2, distributed_optimizer=True)), (4, Layout(pp=2, vpp=2, distributed_optimizer=True))),
    ],
)
def test_resume_goes_on_as_if_unbroken(
    saved: tuple, resumed: tuple, folder: Path, unbroken: tuple, ranks: Any, tmp_path: Path
) -> None:
    ranks(saved[0]).run(train, folder, saved[1], 2, None, tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.name == "step_0000002"
    assert (checkpoint / "config.yaml").read_text() == "a: 1\n"
    assert (checkpoint / "hf" / "tokenizer.json").is_file()
    results = ranks(resumed[0]).run(train, folder, resumed[1], 2, tmp_path, None)
    for values, lr in results:
        torch.testing.assert_close(values, unbroken[0], rtol=1e-4, atol=1e-3)
        assert lr == pytest.approx(unbroken[1])


@pytest.mark.parametrize("sharded", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_uneven_stages_resume_at_other_stages_and_back(sharded: bool, ranks: Any, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", num_hidden_layers=6)
    checkpoints = tmp_path / "checkpoints"
    uneven = (2, Layout(pp=2, vpp=2, distributed_optimizer=sharded, options={FIRST: 2}))
    three = (3, Layout(pp=3, distributed_optimizer=sharded, options={FIRST: 1, LAST: 1}))
    one = (1, Layout(distributed_optimizer=sharded))
    ((expected, _),) = ranks(1).run(train, folder, Layout(), 4, None, None)
    found: list[torch.Tensor] = []
    for done, (world, layout) in enumerate((uneven, three, one, uneven)):
        resume = checkpoints if done else None
        found = [values for values, _ in ranks(world).run(train, folder, layout, 1, resume, checkpoints)]
    for values in found:
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-3)


def test_bfloat16_keeps_its_master_weights(folder: Path, ranks: Any, tmp_path: Path) -> None:
    layout = Layout(precision=torch.bfloat16, distributed_optimizer=True)
    ((straight, _), _) = ranks(2).run(train, folder, layout, 4, None, None)
    ranks(2).run(train, folder, layout, 2, None, tmp_path)
    ((resumed, _), _) = ranks(2).run(train, folder, layout, 2, tmp_path, None)
    assert torch.equal(resumed, straight)


def test_saving_before_the_first_step(folder: Path, unbroken: tuple, ranks: Any, tmp_path: Path) -> None:
    ranks(1).run(train, folder, Layout(), 0, None, tmp_path)
    ((values, _),) = ranks(1).run(train, folder, Layout(), 4, tmp_path, None)
    torch.testing.assert_close(values, unbroken[0], rtol=1e-5, atol=1e-4)


def broken_case(folder: Path, path: Path) -> str:
    """The error of loading something that is no checkpoint."""
    from mpo_megatron.training.checkpoint import load_checkpoint

    model = build(folder, SIZES, Layout())
    try:
        load_checkpoint(path, model.chunks, model.optimizer, model.schedule, model.layout)
    except CheckpointError as error:
        return str(error)
    return ""


def test_an_unfinished_checkpoint_is_not_found_and_a_broken_one_is_named(
    folder: Path, ranks: Any, tmp_path: Path
) -> None:
    from mpo_megatron.training.checkpoint import latest_checkpoint

    (tmp_path / ".step_0000009.tmp").mkdir()
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "step_0000003").mkdir()
    (tmp_path / "step_0000012").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000012"
    (message,) = ranks(1).run(broken_case, folder, tmp_path / "step_0000012")
    assert "step_0000012 is not a complete Megatron distributed checkpoint" in message
