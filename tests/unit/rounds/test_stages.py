"""The stages that a file of rounds asks for: what each reads, is given, and depends on."""

from pathlib import Path

import pytest

from mpo_megatron.config.groups import compose_config
from mpo_megatron.errors import UserError
from mpo_megatron.rounds.config import read_config
from mpo_megatron.rounds.stages import Round, Stage, plan_rounds
from mpo_megatron.runtime.commands import ROOT
from tools.run_rounds import check_arguments, stages_of

SMOLLM2, LLAMA3 = (ROOT / "conf" / "rounds" / f"{name}.yaml" for name in ("smollm2", "llama3_8b"))
KINDS = ["sample", "score", "train", "held-out", "held-out-score", "log-probs"]


def plan(folder: Path, file: Path, *more: str, prompts: int = 1) -> list[Round]:
    for name in ("first", "reward"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text("{}")
    given = [f"model={folder / 'first'}", *more]
    if file == LLAMA3:
        given += ["prompts.train=t", "prompts.held_out=h", f"score.model={folder / 'reward'}"]
    config = read_config(file, given)
    return plan_rounds(config, folder, [], [[{"id": str(i)} for i in range(prompts)]] * config.rounds)


def options(stage: Stage, which: int = 0) -> dict[str, str]:
    """A tool's options by name."""
    given = stage.commands[which].arguments
    return dict(zip(given[::2], given[1::2], strict=True))


def overrides(stage: Stage) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in stage.commands[0].arguments[2:])


def test_each_round_goes_on_from_the_last_one(tmp_path: Path) -> None:
    rounds = plan(tmp_path, SMOLLM2)
    assert [stage.name for stage in stages_of(rounds)] == [
        "round-0/held-out", "round-0/held-out-score", *(f"round-{r}/{kind}" for r in (1, 2, 3) for kind in KINDS),
    ]  # fmt: skip
    for number in (1, 2, 3):
        stages = rounds[number].stages
        start = str(tmp_path / (f"round-{number - 1}/train/model" if number > 1 else "first"))
        assert options(stages["sample"])["--model"] == start
        assert options(stages["sample"])["--prompts"] == str(tmp_path / "prompts" / f"round-{number}.jsonl")
        train = overrides(stages["train"])
        assert train["model.restore_from_path"] == start
        assert train["model.data.train"] == str(tmp_path / f"round-{number}/score/groups.jsonl")
        assert train["model.data.validation"] == str(
            tmp_path / f"round-{number - 1}/held-out-score/groups.jsonl"
        )
        assert "model.mpo.reference_from_path" not in train
        assert options(stages["held-out"])["--model"] == str(tmp_path / f"round-{number}/train/model")
        models = {path.stem: options(stages["log-probs"], i)["--model"]
                  for i, path in enumerate(stages["log-probs"].outputs)}  # fmt: skip
        assert models["policy"] == str(tmp_path / f"round-{number}/train/model")
        assert models["start"] == start
        assert models.get("first", start) == str(tmp_path / "first")
        before = [f"round-{number - 1}/train"] if number > 1 else []
        assert [need.name for need in stages["train"].needs] == [
            f"round-{number}/score", f"round-{number - 1}/held-out-score", *before,
        ]  # fmt: skip


def test_the_first_policy_as_the_reference_of_all(tmp_path: Path) -> None:
    rounds = plan(tmp_path, SMOLLM2, "reference=first")
    references = [overrides(one.stages["train"]).get("model.mpo.reference_from_path") for one in rounds[1:]]
    assert references == [None, str(tmp_path / "first"), str(tmp_path / "first")]


def test_what_a_stage_depends_on(tmp_path: Path) -> None:
    """Not on processes or batch sizes; on the prompts, the first policy's files, options and all keys of the job."""

    def settings(*more: str, prompts: int = 1) -> dict[str, dict[str, str]]:
        return {
            stage.name: stage.settings
            for stage in stages_of(plan(tmp_path, SMOLLM2, "rounds=1", *more, prompts=prompts))
        }

    first = settings()
    assert (
        settings("sample.processes=2", "sample.batch-size=16", "log_probs.batch-size=3", "train.ranks=1")
        == first
    )
    for more, changed in (
        (["sample.top-p=0.5"], {"sample", "held-out"}),
        (["held_out.samples=2"], {"held-out"}),
        (["score.leave-out-failed=true"], {"score", "held-out-score"}),
        (["train.overrides.model.mpo.beta=0.5"], {"train"}),
        (["log_probs.dtype=float64"], {"log-probs"}),
        (["reference=first"], {"train"}),
        (["train.config=qwen2_5_7b"], {"train"}),
    ):
        now = settings(*more)
        assert {name.partition("/")[2] for name in first if first[name] != now[name]} == changed
    now = settings(prompts=2)
    assert {name for name in first if first[name] != now[name]} == {"round-1/sample"}
    (tmp_path / "first" / "more.json").write_text("{}")
    now = settings()
    assert {name for name in first if first[name] != now[name]} == {
        "round-0/held-out", "round-1/sample", "round-1/train", "round-1/log-probs",
    }  # fmt: skip


def test_scores_depend_on_the_model_that_scores(tmp_path: Path) -> None:
    found = []
    for content in ("1", "2"):
        stages = plan(tmp_path, LLAMA3)[1].stages
        found.append({kind: stages[kind].settings for kind in ("score", "held-out-score", "sample")})
        (tmp_path / "reward" / "model.safetensors").write_text(content)
    before, now = found
    assert {kind for kind in now if now[kind] != before[kind]} == {"score", "held-out-score"}


def test_the_papers_rounds(tmp_path: Path) -> None:
    """The main job and the tools take what conf/rounds/llama3_8b.yaml gives them."""
    rounds = plan(tmp_path, LLAMA3)
    rates = []
    for one in rounds[1:]:
        name, given = (
            one.stages["train"].commands[0].arguments[1],
            one.stages["train"].commands[0].arguments[2:],
        )
        config = compose_config(ROOT / "conf" / f"{name}.yaml", given)
        rates.append(config.model.optim.lr)
        assert (config.model.mpo.objective, config.model.mpo.hyper_parameters["beta"]) == ("mpo", 0.01)
        assert (config.model.data.keep_best, config.model.data.keep_worst) == (2, 2)
        assert (config.model.global_batch_size, config.trainer.max_epochs) == (128, 1)
    assert rates == [5e-7, 4e-7, 3e-7]
    for stage in stages_of(rounds):
        for command in stage.commands:
            check_arguments(command, stage)
    assert options(rounds[1].stages["sample"])["--samples"] == "5"
    assert options(rounds[1].stages["held-out"])["--samples"] == "2"


def test_the_main_job_of_a_yaml_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("defaults: [mpo_gpt, _self_]\nmodel: {optim: {weight_decay: 0.25}}\n")
    stage = plan(tmp_path, SMOLLM2, f"train.config={tmp_path}/my.yaml")[1].stages["train"]
    (command,) = stage.commands
    assert command.arguments[:4] == ("--config-dir", str(tmp_path), "--config-name", "my")
    assert compose_config(tmp_path / "my.yaml", command.arguments[4:]).model.optim.weight_decay == 0.25
    assert stage.settings["model.optim.weight_decay"] == "0.25"
    with pytest.raises(UserError, match=r"round 1: there is no your\.yaml in .*; the YAMLs there are my"):
        plan(tmp_path, SMOLLM2, f"train.config={tmp_path}/your.yaml")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model=/no"], "model=/no has no config.json; give a Hugging Face model's folder"),
        (["score.model=/no"], "score.model=/no has no config.json"),
        (
            ["score.function=absent.score"],
            "--function absent.score: No module named 'absent'; its module must be",
        ),
        (["score.function=absent.own.score"], "--function absent.own.score: No module named 'absent'"),
        (["score.function=score"], "--function 'score' must be a module and a function in it"),
        (["train.config=lama"], "round 1: there is no lama.yaml in"),
        (["train.overrides.model.mpo.gamma=1"], "round 1: the objective wmpo does not use model.mpo.gamma=1"),
        (["train.overrides.trainer.max_step=1"], "round 1: unknown key trainer.max_step; did you mean"),
        (["per_round=[{}, {model.optim.lr: x}, {}]"], "model.optim.lr=x"),
    ],
)
def test_what_the_job_would_not_take_is_said_at_once(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        plan(tmp_path, SMOLLM2, *more)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sample.tempo=3", "round-0/held-out: generate.py does not take these options: unrecognized arguments:"),
        ("sample.top-p=much", "generate.py does not take these options: argument --top-p: invalid float value: 'much'"),
        ("score.scorer=best", "round-0/held-out-score: score.py does not take these options: argument --scorer:"),
        ("log_probs.dtype=float8", "round-1/log-probs: logprobs.py does not take these options: argument --dtype"),
    ],
)  # fmt: skip
def test_what_a_tool_would_not_take_is_said_at_once(more: str, message: str, tmp_path: Path) -> None:
    def check() -> None:
        for stage in stages_of(plan(tmp_path, SMOLLM2, more)):
            for command in stage.commands:
                check_arguments(command, stage)

    with pytest.raises(UserError) as raised:
        check()
    assert message in str(raised.value)


def test_scores_depend_on_the_source_of_the_function_that_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read and not run: what it imports may take a GPU that the stages need."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "rewards_of_rounds.py"
    settings = []
    for factor in (1, 1, 2):
        source.write_text(f"raise SystemExit\ndef score(group): return [{factor}.0, 0.0]\n")
        rounds = plan(tmp_path, SMOLLM2, "score.scorer=function", "score.function=rewards_of_rounds.score")
        settings.append([one.stages["held-out-score"].settings for one in rounds])
    assert settings[0] == settings[1] != settings[2]
    assert settings[0][0].keys() == settings[2][0].keys()
