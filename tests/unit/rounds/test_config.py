"""Files of rounds: what each round is given, and what is wrong in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_megatron.errors import UserError
from mpo_megatron.rounds.config import read_config
from mpo_megatron.runtime.commands import ROOT

EXAMPLES = ROOT / "conf" / "rounds"
WHOLE: dict[str, Any] = {"model": "m", "rounds": 2, "prompts": {"train": "t", "held_out": "h"}}


def write(folder: Path, **content: Any) -> Path:
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump({**WHOLE, **content}, sort_keys=False))
    return path


def test_what_is_left_out_and_what_the_command_changes(tmp_path: Path) -> None:
    config = read_config(write(tmp_path), ["rounds=5", "prompts.limit=7", "sample.top-p=0.5"])
    assert (config.model, config.rounds, config.reference) == ("m", 5, "previous")
    assert (config.prompts.train, config.prompts.limit, config.prompts.each_round) == ("t", 7, "own")
    assert config.sampling(1) == {"top_p": 0.5}
    assert config.overrides(1) == []


def test_each_round_has_its_own_settings_after_those_of_all(tmp_path: Path) -> None:
    config = read_config(
        write(
            tmp_path,
            sample={"samples": 4, "max-new-tokens": 9},
            held_out={"samples": 2, "max_new_tokens": 5},
            train={"overrides": {"trainer": {"max_steps": 3}, "model.optim.lr": 1.0}},
            per_round=[
                None,
                {"model.optim.lr": 0.5, "model": {"mpo": {"beta": 2}}, "sample": {"samples": 6}},
            ],
        )
    )
    assert config.sampling(0) == {"samples": 2, "max_new_tokens": 5}
    assert config.sampling(1) == {"samples": 4, "max_new_tokens": 9}
    assert config.sampling(2) == {"samples": 6, "max_new_tokens": 9}
    common = ["trainer.max_steps=3", "model.optim.lr=1.0"]
    assert config.overrides(1) == common
    assert config.overrides(2) == [*common, "model.optim.lr=0.5", "model.mpo.beta=2"]


def test_the_rates_of_the_paper() -> None:
    """Table 10: iterative, Llama3-Instruct."""
    more = ["model=m", "prompts.train=t", "prompts.held_out=h", "score.model=r"]
    config = read_config(EXAMPLES / "llama3_8b.yaml", more)
    rates = [config.overrides(number)[-1] for number in (1, 2, 3)]
    assert rates == ["model.optim.lr=5e-07", "model.optim.lr=4e-07", "model.optim.lr=3e-07"]
    assert "model.mpo.beta=0.01" in config.overrides(1)
    assert config.sampling(1)["samples"] == 5
    assert {"model.data.keep_best=2", "model.data.keep_worst=2"} <= set(config.overrides(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rounds": 0}, "rounds=0 must be 1 or more"),
        ({"rounds": "two"}, "rounds: Value 'two' of type 'str' could not be converted to Integer"),
        ({"round": 3}, "unknown key round; did you mean rounds?"),
        ({"prompts": {"train": "t"}}, "prompts.held_out must be given"),
        ({"prompts": {"train": "t", "held_out": "h", "limits": 3}}, "unknown key prompts.limits; did you mean"),
        ({"prompts": {"train": "t", "held_out": "h", "limit": 0}}, "prompts.limit=0 leaves no prompt"),
        ({"prompts": {"train": "t", "held_out": "h", "each_round": "some"}}, "prompts.each_round=some must be own or"),
        ({"reference": "last"}, "reference=last must be previous or first"),
        ({"train": {"ranks": 0}}, "train.ranks=0 must be 1 or more"),
        ({"train": {"overrides": {"model.data.train": "x"}}}, "train.overrides: model.data.train is set by the"),
        ({"train": {"overrides": ["trainer"]}}, "train.overrides: trainer is no override"),
        ({"per_round": [{}]}, "per_round has 1 entries for 2 rounds; give one for each"),
        ({"per_round": [{}, "lr"]}, "per_round[1] must be a mapping such as"),
        ({"per_round": [{}, {"exp_manager.explicit_log_dir": "x"}]}, "exp_manager.explicit_log_dir is set by --output"),
        ({"per_round": [{"sample": {"seed": 1}}, {}]}, "per_round[0].sample.seed is set by the rounds"),
        ({"sample": {"seed": 1}}, "sample.seed is set by the rounds; remove it"),
        ({"held_out": {"samples": 1}}, "samples=1 of the held-out prompts, which are the trainings' validation"),
        ({"per_round": [{}, {"sample": {"samples": 1}}]}, "samples=1 of round 2: a group needs 2 or more"),
        ({"held_out": {"limit": 1}}, "held_out.limit is set by the rounds; remove it"),
        ({"score": {"input": "x"}}, "score.input is set by the rounds; remove it"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **content)
    with pytest.raises(UserError, match="^" + str(path)) as raised:
        read_config(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_file_and_no_override_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml cannot be read"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="must be a mapping"):
        read_config(tmp_path / "list.yaml")
    with pytest.raises(UserError, match="rounds is no override; write key=value"):
        read_config(write(tmp_path), ["rounds"])
    with pytest.raises(UserError, match="unknown key seeds; did you mean seed"):
        read_config(write(tmp_path), ["seeds=3"])
