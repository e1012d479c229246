"""Checkpoints: a run that stops and resumes is the run that did not stop, at the same layout and at another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.conversion.buckets import BUCKETS_FILE
from mpo_megatron.errors import CheckpointError
from tests.distributed.jobs import Layout, build, gradients, logps
from tests.distributed.jobs import save as write
from tests.helpers.models import make_llama, make_model

SIZES = [3, 4, 2, 5]
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


FORMS = ("dp_reshardable", "fully_reshardable")


def train(
    folder: Path,
    wanted: Layout,
    steps: int,
    resume: Path | None,
    save: Path | None,
    form: str = FORMS[0],
) -> tuple[torch.Tensor, float]:
    """Take steps from the start or from a checkpoint, save if asked. Returns log-probs and the learning rate."""
    from mpo_megatron.training.checkpoint import latest_checkpoint, load_checkpoint

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
        write(model, done + steps, save, folder, form)
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


def state_after(
    folder: Path, wanted: Layout, resume: Path, *, by_megatron: bool
) -> list[dict[str, torch.Tensor]]:
    """Masters and moments of each parameter of this rank after loading, with nothing of what was there before."""
    from megatron.core import dist_checkpointing

    from mpo_megatron.training.checkpoint import latest_checkpoint, load_checkpoint, sharded_models
    from mpo_megatron.training.optimizer_state import _cut_padding, _parts

    model = build(folder, SIZES, wanted)
    for part in _parts(model.optimizer):
        for parameter, state in part.optimizer.state.items():
            parameter.detach().fill_(7.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].fill_(7.0)
    newest = latest_checkpoint(resume)
    assert newest is not None
    if by_megatron:
        models, metadata = sharded_models(model.chunks), {"distrib_optim_sharding_type": FORMS[0]}
        asked = model.optimizer.sharded_state_dict(models, is_loading=True, metadata=metadata)
        _cut_padding(asked)
        loaded = dist_checkpointing.load({**models, "optimizer": asked}, str(newest))
        with torch.no_grad():
            model.optimizer.load_state_dict(loaded["optimizer"])
    else:
        done = load_checkpoint(newest, model.chunks, model.optimizer, model.schedule, model.layout)
        assert done == 2
    return [
        {"param": parameter.detach().clone(), **{name: state[name] for name in ("exp_avg", "exp_avg_sq")}}
        for part in _parts(model.optimizer)
        for parameter, state in part.optimizer.state.items()
    ]


@pytest.mark.parametrize(
    ("family", "world", "layout", "after"),
    [
        ("llama", 2, Layout(distributed_optimizer=True), (4, Layout(distributed_optimizer=True))),
        (
            "llama",
            4,
            Layout(tp=2, distributed_optimizer=True, precision=torch.bfloat16),
            (2, Layout(tp=2, distributed_optimizer=True, precision=torch.bfloat16)),
        ),
        (
            "qwen2",
            4,
            Layout(pp=2, vpp=2, distributed_optimizer=True),
            (4, Layout(pp=2, vpp=2, cp=2, distributed_optimizer=True)),
        ),
        (
            "qwen3_moe",
            4,
            Layout(ep=2, distributed_optimizer=True),
            (2, Layout(ep=2, distributed_optimizer=True)),
        ),
    ],
    ids=["dp2 to dp4", "tp2-dp2 to tp2, bf16", "pp2-vpp2-dp2 to cp2", "ep2-dp2 to ep2"],
)
def test_buckets_hold_what_megatron_reads_from_them(
    family: str, world: int, layout: Layout, after: tuple[int, Layout], ranks: Any, tmp_path: Path
) -> None:
    """Where Megatron can read them itself, every element comes to the same place."""
    source = make_model(tmp_path / "source", family)
    saved = tmp_path / "saved"
    ranks(world).run(train, source, layout, 2, None, saved)
    assert (saved / "step_0000002" / BUCKETS_FILE).is_file()
    for count, wanted in ((world, layout), after):
        found = ranks(count).run(state_after, source, wanted, saved, by_megatron=False)
        expected = ranks(count).run(state_after, source, wanted, saved, by_megatron=True)
        for ours, theirs in zip(found, expected, strict=True):
            assert len(ours) == len(theirs) > 0
            for a, b in zip(ours, theirs, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in b)
                assert not (a["exp_avg"] == 7.0).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "world", "layout"),
    [
        ("llama", 2, Layout(distributed_optimizer=True)),
        ("llama", 2, Layout(precision=torch.bfloat16, distributed_optimizer=True)),
        ("qwen3_moe", 2, Layout(ep=2, distributed_optimizer=True)),
        ("llama", 4, Layout(tp=2, precision=torch.bfloat16, distributed_optimizer=True)),
        ("llama", 2, Layout(precision=torch.bfloat16)),
    ],
    ids=["dp2", "dp2 in bf16", "ep2", "tp2-dp2 in bf16", "plain in bf16"],
)
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(
    family: str, world: int, layout: Layout, form: str, ranks: Any, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "source", family)
    saved = tmp_path / "saved"
    ((straight, _), *_) = ranks(world).run(train, source, layout, 4, None, None)
    ranks(world).run(train, source, layout, 2, None, saved, form)
    in_buckets = form == FORMS[0] and layout.distributed_optimizer
    assert (saved / "step_0000002" / BUCKETS_FILE).is_file() == in_buckets
    ((resumed, _), *_) = ranks(world).run(train, source, layout, 2, saved, None)
    assert torch.equal(resumed, straight)


@pytest.mark.parametrize("form", FORMS)
def test_experts_resume_at_another_layout(form: str, ranks: Any, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "qwen3_moe")
    saved = tmp_path / "saved"
    one, two = Layout(distributed_optimizer=True), Layout(ep=2, tp=2, distributed_optimizer=True)
    ((expected, _),) = ranks(1).run(train, source, one, 4, None, None)
    ranks(4).run(train, source, two, 2, None, saved, form)
    ((values, _),) = ranks(1).run(train, source, one, 2, saved, None)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-3)


def load_error(folder: Path, wanted: Layout, path: Path) -> str:
    """The error of resuming from a checkpoint."""
    from mpo_megatron.training.checkpoint import load_checkpoint

    model = build(folder, SIZES, wanted)
    try:
        load_checkpoint(path, model.chunks, model.optimizer, model.schedule, model.layout)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("sharded", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_the_other_optimizers_state_is_refused_in_one_sentence(
    sharded: bool, folder: Path, ranks: Any, tmp_path: Path
) -> None:
    ranks(2).run(train, folder, Layout(distributed_optimizer=sharded), 1, None, tmp_path)
    path = tmp_path / "step_0000001"
    errors = ranks(2).run(load_error, folder, Layout(distributed_optimizer=not sharded), path)
    said = f"{path} was saved with model.optim.distributed={str(sharded).lower()}, and the state of that optimizer"
    assert errors[0] == errors[1]
    assert errors[0].startswith(said)


def test_damaged_buckets_are_named_on_all_ranks(folder: Path, ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(train, folder, Layout(distributed_optimizer=True), 1, None, tmp_path)
    path = tmp_path / "step_0000001"
    listed = (path / BUCKETS_FILE).read_text()
    first, _, rest = listed.partition('["decoder.layers.mlp.linear_fc2.weight"')
    other = Layout(pp=2, distributed_optimizer=True)
    for text, message in (
        (f'{first}["decoder.layers.mlp.linear_fc3.weight"{rest}', "has no data for optimizer.state."),
        (listed[:-9], f"{path / BUCKETS_FILE} cannot be read"),
    ):
        (path / BUCKETS_FILE).write_text(text)
        errors = ranks(2).run(load_error, folder, other, path)
        assert errors[0] == errors[1]
        assert message in errors[0]
        assert "\n" not in errors[0]


def test_saving_before_the_first_step(folder: Path, unbroken: tuple, ranks: Any, tmp_path: Path) -> None:
    ranks(1).run(train, folder, Layout(), 0, None, tmp_path)
    ((values, _),) = ranks(1).run(train, folder, Layout(), 4, tmp_path, None)
    torch.testing.assert_close(values, unbroken[0], rtol=1e-5, atol=1e-4)


def test_an_unfinished_checkpoint_is_not_found_and_a_broken_one_is_named(
    folder: Path, ranks: Any, tmp_path: Path
) -> None:
    from mpo_megatron.training.checkpoint import latest_checkpoint

    (tmp_path / ".step_0000009-abc").mkdir()
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "step_0000003").mkdir()
    (tmp_path / "step_0000012").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000012"
    (message,) = ranks(1).run(load_error, folder, Layout(), tmp_path / "step_0000012")
    assert "step_0000012 is not a complete Megatron distributed checkpoint" in message
