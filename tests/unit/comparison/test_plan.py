"""Comparison files: what the members' runs are given, and what is wrong in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_megatron.comparison.plan import DEFAULTS, composed, plan_runs, read_comparison
from mpo_megatron.comparison.sweep import lines_of, points
from mpo_megatron.errors import UserError
from mpo_megatron.objectives import names
from mpo_megatron.overrides import as_value
from mpo_megatron.runtime.commands import ROOT

EVERY = ROOT / "conf" / "compare" / "objectives.yaml"
# Some folder that is there, a small one.
MODEL = f"model.restore_from_path={ROOT / 'conf'}"
DPO = {"objective": "dpo", "beta": 0.2}


def write(folder: Path, members: Any, seeds: Any = (1,), **more: Any) -> Path:
    content = {"seeds": list(seeds) if isinstance(seeds, tuple) else seeds, "members": members, **more}
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def overrides(path: Path, member: str, *more: str) -> tuple[str, ...]:
    return plan_runs(read_comparison(path), [member], Path("out"), [MODEL, *more])[0].overrides


def test_the_example_has_every_objective_and_the_job_takes_them() -> None:
    runs = plan_runs(read_comparison(EVERY), None, Path("out"), [MODEL])
    assert sorted(run.member for run in runs) == names()
    for run in runs:
        config = composed(run.overrides)
        assert config.model.mpo.objective == run.member
        assert (config.trainer.max_steps, config.trainer.seed, config.model.export_path) == (3, 1234, "")


@pytest.mark.parametrize(
    ("name", "runs", "axes"),
    [("example", 24, set()), ("noise_and_size", 72, {"keep_first", "score_noise"})],
)
def test_the_other_files_are_taken_by_the_job(name: str, runs: int, axes: set[str]) -> None:
    """Their data are there, or made by the command in docs/comparing.md; prompts are none that are trained on."""
    comparison = read_comparison(EVERY.with_name(f"{name}.yaml"))
    assert len(comparison.members) * len(comparison.seeds) == runs
    planned = plan_runs(comparison, list(comparison.members)[-2:], Path("out"), [MODEL])
    assert {axis for member in comparison.members.values() for axis in member.point} == axes
    data = composed(planned[0].overrides).model.data
    assert (ROOT / str(data.validation)).is_file()
    assert (ROOT / data.train).is_file() or data.train in (ROOT / "docs" / "comparing.md").read_text()
    if comparison.samples is not None:
        asked = comparison.samples.generate
        assert (ROOT / asked["prompts"]).is_file()
        assert asked["split"] == "validation"


def test_all_members_at_the_first_seed_come_first(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": DPO, "b": DPO}, seeds=(5, 6))
    runs = plan_runs(read_comparison(path), None, Path("out"), [MODEL])
    assert [(run.member, run.seed) for run in runs] == [("a", 5), ("b", 5), ("a", 6), ("b", 6)]
    assert runs[3].folder == Path("out/b/seed-6")
    assert runs[3].overrides[-1] == "trainer.seed=6"
    assert str(runs[3]) == "b, seed 6"
    (only,) = plan_runs(
        read_comparison(write(tmp_path, {"a": DPO, "b": DPO})), ["b", "b"], Path("out"), [MODEL]
    )
    assert only.member == "b"


def test_a_run_depends_on_what_its_files_hold(tmp_path: Path) -> None:
    """And not on how its settings are said: a YAML that was edited, or data made anew, are other settings."""
    model, data = tmp_path / "model", tmp_path / "train.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    data.write_text("1\n")
    path = write(tmp_path, {"a": DPO}, common={"trainer": {"max_steps": 5}})
    more = [f"model.restore_from_path={model}", f"model.data.train={data}"]

    def settings(*overrides: str) -> dict[str, str]:
        (run,) = plan_runs(read_comparison(path), None, Path("out"), [*more, *overrides])
        return run.settings

    first = settings()
    assert settings("trainer.max_steps=5", "trainer.num_nodes=1") == first
    assert first["trainer.seed"] == "1"
    assert set(settings("trainer.max_steps=6").items() ^ first.items()) == {
        ("trainer.max_steps", "5"), ("trainer.max_steps", "6"),
    }  # fmt: skip
    for file in (data, model / "config.json"):
        before, _ = settings(), file.write_text("22\n")
        (key,) = {key for key, value in settings().items() if before[key] != value}
        assert key == f"what {'model.data.train' if file == data else 'model.restore_from_path'} holds"


def test_a_mapping_gives_all_hyper_parameters_of_its_objective(tmp_path: Path) -> None:
    """Those of the YAML's objective (beta, alpha) and of `common` are taken back; keys with sections go elsewhere."""
    common = {"model": {"mpo": {"k": 3}, "data": {"max_length": 300}}, "trainer.max_steps": 7}
    members = {
        "sft": {"objective": "sft"},
        "few": {
            "objective": "simpo", "beta": 2, "gamma": 0.5,
            "model.data.keep_best": 1, "model": {"data": {"keep_worst": 1}},
        },
        "noise": {"model.mpo.k": None, "model.data.score_noise": 1.5},
    }  # fmt: skip
    path = write(tmp_path, members, common=common)
    assert overrides(path, "sft") == (
        *DEFAULTS, "model.mpo.k=3", "model.data.max_length=300", "trainer.max_steps=7",
        "model.mpo.beta=null", "model.mpo.alpha=null", "model.mpo.k=null", "model.mpo.objective=sft", MODEL,
        "trainer.seed=1",
    )  # fmt: skip
    few = composed(overrides(path, "few")).model
    given = {name: value for name, value in few.mpo.hyper_parameters.items() if value is not None}
    assert given == {"beta": 2, "gamma": 0.5}
    assert (few.data.keep_best, few.data.keep_worst, few.data.max_length) == (1, 1, 300)
    noise = composed(overrides(path, "noise")).model
    assert (noise.mpo.objective, noise.mpo.hyper_parameters["beta"], noise.data.score_noise) == (
        "wmpo",
        0.1,
        1.5,
    )


def test_overrides_as_typed_and_those_of_the_command_come_last(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"a": ["model.mpo.objective=mpo", "model.mpo.alpha=null", "name=x"]}, common=["name=y"]
    )
    config = composed(overrides(path, "a", "model.mpo.beta=0.7", "trainer.max_steps=9"))
    assert (config.model.mpo.objective, config.model.mpo.hyper_parameters["beta"]) == ("mpo", 0.7)
    assert (config.name, config.trainer.max_steps) == ("x", 9)


@pytest.mark.parametrize(
    "value",
    [1, 2.5, 1e-05, True, None, "", "bf16", "with space", 'a "b"', "a=b", "/tmp/x y/[1]", [0.9, 0.95], "32"],
)
def test_values_come_through_hydra(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"name={as_value(value)}").value()
    assert str(parsed) == str(value) if isinstance(value, str) else parsed == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("members: [", "cannot be read"),
        ("a", "has the keys seeds, common, members, baseline, sweep and samples, not a"),
        ("3", "cannot be read"),
        ("'3'", "must hold keys with their values"),
        ("seeds: [1]\nmembers: {a: []}\nbaseline: [a]", "baseline=['a'] is no member"),
        ("seeds: [1]\nmembers: {a: []}\nsamples: {generate: {prompts: p}, seeds: [[1]]}", "seeds=[[1]] must be"),
        ("[1]", "sweep and samples, not a list"),
        ("seed: [1]\nmembers: {a: []}", "sweep and samples, not seed, members"),
        ("members: {a: []}", "seeds must be a list of whole numbers such as [1, 2, 3], not None"),
        ("seeds: 3\nmembers: {a: []}", "seeds must be a list of whole numbers such as [1, 2, 3], not 3"),
        ("seeds: [true]\nmembers: {a: []}", "seeds must be a list of whole numbers"),
        ("seeds: [1, 1]\nmembers: {a: []}", "has one of them twice"),
        ("seeds: [1]", "members must give a name and overrides"),
        ("seeds: [1]\nmembers: {a: [], a: []}", "duplicate key"),
        ("seeds: [1]\nmembers: {a: dpo}", "members.a must be a mapping such as"),
        ("seeds: [1]\nmembers: {a: }", "members.a must be a mapping such as"),
        ("seeds: [1]\nmembers: {a: [dpo]}", "members.a: dpo is no override; write key=value"),
        ("seeds: [1]\nmembers: {a: [1]}", "members.a: 1 is no override; write key=value"),
        ("seeds: [1]\nmembers: {../a: []}", "members: ../a names a folder"),
        ("seeds: [1]\nmembers: {cache: []}", "members: cache names a folder"),
        ("seeds: [1]\nmembers: {start: []}", "members: start names a folder"),
        ("seeds: [1]\nmembers: {a: []}\nbaseline: b", "baseline=b is no member; there are a"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: [1]", "sweep must give values by key"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: {beta: 1}", "sweep.beta must be a list of values"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: {beta: []}", "sweep.beta must be a list of values"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: {beta: [[1]]}", "sweep.beta must be a list of values"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: {beta: [1, 1]}", "sweep.beta=[1, 1] has one of them twice"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: {name: ['a,', 'a;']}", "two points of the name name_a_"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: {n: {2: beta}}", "sweep.n.2 must be a mapping such as"),
        ("seeds: [1]\nmembers: {a: []}\nsweep: {trainer.seed: [1]}", "trainer.seed is set by `seeds`"),
        ("seeds: [1]\nmembers: {a: [], a-beta_1: []}\nsweep: {beta: [1, 1-beta_1]}", "is a point of the sweep, too"),
        ("seeds: [1]\nmembers: {a: []}\nsamples: {}", "samples must give `generate`"),
        ("seeds: [1]\nmembers: {a: []}\nsamples: {generate: {}}", "samples.generate has no prompts"),
        ("seeds: [1]\nmembers: {a: []}\nsamples: {generate: [1]}", "samples.generate must give options of tools/gen"),
        (
            "seeds: [1]\nmembers: {a: []}\nsamples: {generate: {prompts: p, model: m}}",
            "samples.generate.model is set by the comparison",
        ),
        (
            "seeds: [1]\nmembers: {a: []}\nsamples: {generate: {prompts: p}, seeds: [2]}",
            "samples.seeds=[2] must be some of seeds=[1]",
        ),
        ("seeds: [1]\nmembers: {a: [trainer.seed=3]}", "trainer.seed is set by `seeds`"),
        ("seeds: [1]\ncommon: {trainer: {seed: 3}}\nmembers: {a: []}", "trainer.seed is set by `seeds`"),
        ("seeds: [1]\nmembers: {a: {model: {mpo: }, exp_manager: {explicit_log_dir: x}}}", "is set by --output"),
        ("seeds: [1]\ncommon: {modl.name: 3}\nmembers: {a: []}", "unknown key modl; did you mean model?"),
        ("seeds: [1]\ncommon: {trainer: {max_steps: 0}}\nmembers: {a: []}", "trainer.max_steps=0 must be 1 or more"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="^" + str(path)) as raised:
        read_comparison(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_sweep_makes_a_member_of_every_point(tmp_path: Path) -> None:
    """Keys of model.mpo and others, and values by names of one's own; what it gives is not taken back."""
    sweep = {
        "alpha": [0, 0.5],
        "model.data.keep_first": [2, None],
        "sets": {
            "one": {"model.data.keep_best": 1, "model.data.keep_worst": 1},
            "all": {},
        },
    }
    members = {"wmpo": {"objective": "wmpo", "beta": 0.2}, "typed": []}
    path = write(tmp_path, members, sweep=sweep, baseline="typed")
    comparison = read_comparison(path)
    assert comparison.baseline == "typed"
    names = [
        f"-alpha_{a}-keep_first_{k}-sets_{s}"
        for a in ("0", "0.5")
        for k in ("2", "None")
        for s in ("one", "all")
    ]
    assert list(comparison.members) == [f"{base}{name}" for base in members for name in names]
    found = comparison.members["wmpo-alpha_0.5-keep_first_None-sets_one"]
    assert (found.base, found.point) == ("wmpo", {"alpha": 0.5, "keep_first": None, "sets": "one"})
    for name, member in list(comparison.members.items())[4:12]:
        model = composed(member.overrides).model
        given = {key: value for key, value in model.mpo.hyper_parameters.items() if value is not None}
        assert given == {"beta": 0.2 if name.startswith("wmpo") else 0.1, "alpha": member.point["alpha"]}
        sets = 1 if member.point["sets"] == "one" else None
        assert (model.data.keep_first, model.data.keep_best, model.data.keep_worst) == (
            member.point["keep_first"], sets, sets,
        )  # fmt: skip
    asked = ["wmpo-alpha_0-keep_first_2-sets_all", "wmpo-alpha_0-keep_first_2-sets_one"]
    runs = plan_runs(comparison, asked, Path("out"), [MODEL])
    assert [run.folder for run in runs] == [Path("out") / name / "seed-1" for name in asked]


def test_a_name_before_the_sweep_is_of_all_its_points(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path, {"a": DPO, "b": DPO}, sweep={"beta": [1, 2]}))
    runs = plan_runs(comparison, ["b", "a-beta_2"], Path("out"), [MODEL])
    assert [run.member for run in runs] == ["b-beta_1", "b-beta_2", "a-beta_2"]


def test_axes_whose_keys_end_alike_have_whole_names() -> None:
    (point,) = points({"model.optim.lr": [1], "model.x.lr": [2], "beta": [3]})
    assert point.values == {"model.optim.lr": 1, "model.x.lr": 2, "beta": 3}
    assert point.suffix == "-model.optim.lr_1-model.x.lr_2-beta_3"


def test_the_lines_of_a_sweep() -> None:
    grid = points({"a": [1, 2], "b": ["x", "y"]})
    members = {base + point.suffix: (base, point.values) for base in ("m", "n") for point in grid}
    found = dict(lines_of(members, "a"))
    assert list(found) == ["m, b x", "m, b y", "n, b x", "n, b y"]
    assert found["n, b x"] == [(1, "n-a_1-b_x"), (2, "n-a_2-b_x")]
    assert dict(lines_of({"m": ("m", {})}, "a")) == {}


def test_members_of_several_models_are_not_sampled(tmp_path: Path) -> None:
    members = {"a": DPO, "b": {**DPO, "model.restore_from_path": str(ROOT / "docs")}}
    path = write(tmp_path, members, samples={"generate": {"prompts": "p.jsonl"}}, common=[MODEL])
    with pytest.raises(UserError, match="members begin at 2 models; with `samples` they begin at one"):
        plan_runs(read_comparison(path), None, Path("out"), [])
    (run,) = plan_runs(read_comparison(path), ["b"], Path("out"), [])
    assert (run.start, run.keeps_model) == (ROOT / "docs", True)
    (run,) = plan_runs(read_comparison(path), ["b"], Path("out"), ['model.export_path=""'])
    assert not run.keeps_model


def test_no_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml cannot be read: .*No such file"):
        read_comparison(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("members", "more", "message"),
    [
        (["dop"], [], "--members: dop is no member of the comparison; did you mean dpo?"),
        (["zzz"], [], "--members: zzz is no member of the comparison; there are dpo, bad"),
        (None, [], "member bad: the objective mpo needs model.mpo.beta"),
        (["dpo"], ["trainer.max_steps"], "the command: trainer.max_steps is no override; write key=value"),
        (["dpo"], ["trainer.max_step=3"], "unknown key trainer.max_step; did you mean trainer.max_steps?"),
        (["dpo"], ["model.mpo.gamma=3"], "member dpo: the objective dpo does not use model.mpo.gamma=3"),
        (["dpo"], ["model.mpo.objective=dop"], "member dpo: model.mpo.objective=dop is not known"),
        (["dpo"], ["model.mpo.beta=[0.1"], "cannot read the override"),
        (
            ["dpo"],
            ["model.restore_from_path=/no"],
            "member dpo: model.restore_from_path=/no is no folder; give a",
        ),
        (["dpo"], ["exp_manager.explicit_log_dir=x"], "explicit_log_dir is set by --output"),
        (["dpo"], ["model.export_path=x"], "member dpo: model.export_path=x would be written by every run"),
        (["dpo"], ["model.data.validation=null"], "member dpo: model.data.validation has no value"),
    ],
)
def test_what_the_job_would_not_take_is_said_before_the_first_run(
    members: list[str] | None, more: list[str], message: str, tmp_path: Path
) -> None:
    comparison = read_comparison(write(tmp_path, {"dpo": DPO, "bad": {"objective": "mpo"}}))
    with pytest.raises(UserError) as raised:
        plan_runs(comparison, members, tmp_path, [MODEL, *more])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
