"""Figures of rounds by hand, and the tables, the picture and the samples that show them."""

import csv
import json
import math
from pathlib import Path

import pytest

from mpo_megatron.means import Mean
from mpo_megatron.rollout.records import Record, write_jsonl
from mpo_megatron.rounds import report, state
from mpo_megatron.rounds.figures import difference, divergence, examples, lines, over_prompts
from mpo_megatron.rounds.stages import Command, Round, Stage

Samples = dict[str, list[tuple[str, float]]]


def group(name: str, samples: list[tuple[str, float]]) -> Record:
    responses = [
        {"text": text, "finish_reason": "stop" if text else "length", "score": score}
        for text, score in samples
    ]
    return {"id": name, "prompt": f"Prompt {name}", "responses": responses}


def stage(folder: Path, name: str, *outputs: str) -> Stage:
    commands = tuple(Command(Path("tool.py"), (), folder / name / output) for output in outputs)
    return Stage(name, folder / name, commands, {}, ())


def done(one: Stage, seconds: float) -> Stage:
    for output in one.outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    state.begin(one)
    state.finish(one, seconds)
    return one


def make_round(
    folder: Path, number: int, held_out: Samples, log_probs: dict[str, list[list[float]]]
) -> Round:
    """A round whose stages are done, with these scores; round 0 has no training."""
    kinds = {"held-out": ["groups.jsonl"], "held-out-score": ["groups.jsonl"]}
    if number:
        kinds |= {
            "score": ["groups.jsonl"],
            "train": ["model"],
            "log-probs": [f"{name}.jsonl" for name in log_probs],
        }
    stages = {kind: stage(folder, f"round-{number}/{kind}", *outputs) for kind, outputs in kinds.items()}
    for one in stages.values():
        one.folder.mkdir(parents=True)
    write_jsonl(stages["held-out-score"].outputs[0], [group(name, own) for name, own in held_out.items()])
    if number:
        write_jsonl(
            stages["score"].outputs[0], [group("t", [("x", 1.0), ("y", 3.0)]), group("u", [("z", 6.0)])]
        )
        values = {"reward_margin": 0.0, "accuracy": 0.5, "loss": 0.7}
        metrics = [
            {"step": 0, "split": "validation", **values},
            {"step": 5, "split": "train", "seconds": 2.0},
            {"step": 5, "split": "validation", **values, "reward_margin": 0.25, "accuracy": 0.75},
        ]
        (stages["train"].folder / "experiment").mkdir()
        (stages["train"].folder / "experiment" / "metrics.jsonl").write_text(
            "\n".join(map(json.dumps, metrics))
        )
        for name, values_of in log_probs.items():
            lines_of = [{"id": key, "log_probs": own} for key, own in zip(held_out, values_of, strict=True)]
            write_jsonl(stages["log-probs"].folder / f"{name}.jsonl", lines_of)
    return Round(number, {kind: done(one, 30.0) for kind, one in stages.items()})


@pytest.fixture
def rounds(tmp_path: Path) -> list[Round]:
    """Of two prompts, a and b; the third round is not done."""
    return [
        make_round(tmp_path, 0, {"a": [("one", 1.0), ("two", 3.0)], "b": [("", 4.0), ("four", 4.0)]}, {}),
        make_round(
            tmp_path, 1, {"a": [("one", 1.0), ("to", 5.0)], "b": [("", 4.0), ("four", 2.0)]},
            {"policy": [[-1.0, -2.0], [-3.0, -4.0]], "start": [[-2.0, -2.0], [-3.0, -7.0]]},
        ),
        make_round(
            tmp_path, 2, {"a": [("1", 9.0), ("2", 9.0)], "b": [("3 3", 4.0), ("4", 4.0)]},
            {"policy": [[-1.0, -1.0], [-1.0, -1.0]], "start": [[-2.0, -2.0], [-2.0, -2.0]],
             "first": [[-5.0, -5.0], [-5.0, -5.0]]},
        ),
        Round(3, {"held-out": stage(tmp_path, "round-3/held-out", "groups.jsonl")}),
    ]  # fmt: skip


def test_figures_by_hand(rounds: list[Round]) -> None:
    first, second, third = lines(rounds, lambda response: len(response["text"]))
    # Means of the prompts: 2 and 4, 3 and 3, 9 and 4.
    assert (first.score, second.score, third.score) == (Mean(3.0, 1.0), Mean(3.0, 0.0), Mean(6.5, 2.5))
    assert (first.tokens, first.finished) == (Mean(2.5, 0.5), Mean(0.75, 0.25))
    assert (first.seconds, second.seconds) == (60.0, 150.0)
    assert (first.change, first.kl_start, first.better, first.margin_after, first.train_score) == (None,) * 5
    assert (second.change, second.better, second.worse, second.changed) == (Mean(0.0, 1.0), 1, 1, 0.25)
    assert third.change == Mean(3.5, 2.5)
    assert third.total is not None
    assert third.total.mean == 3.5
    assert third.total.error == pytest.approx(3.5)
    assert (third.better, third.worse, third.changed) == (2, 0, 1.0)
    # Of each prompt 0.5 and 1.5.
    assert second.kl_start == second.kl_first == Mean(1.0, 0.5)
    assert (third.kl_start, third.kl_first) == (Mean(1.0, 0.0), Mean(4.0, 0.0))
    assert (second.margin_before, second.margin_after, second.accuracy_after, second.steps) == (
        0.0,
        0.25,
        0.75,
        5,
    )
    assert (second.train_prompts, second.train_score) == (2, Mean(4.0, 2.0))


def test_means_are_of_prompts_and_differences_of_those_that_both_have() -> None:
    found = over_prompts({"a": [1.0], "b": [2.0, 4.0], "c": [8.0, 8.0]})
    assert found.mean == 4.0
    assert found.error == pytest.approx(math.sqrt(13 / 3))
    assert over_prompts({"a": [1.0, 3.0]}) == Mean(2.0, None)
    assert difference({"a": [1.0], "b": [2.0]}, {"b": [3.0, 6.0], "c": [0.0]}) == {"b": [2.5]}
    apart = divergence({"a": {"log_probs": [-1.0, -3.0]}}, {"a": {"log_probs": [-2.0, -6.0]}})
    assert apart == Mean(2.0, None)


def test_the_tables(rounds: list[Round], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(rounds, lambda response: len(response["text"]))
    report.show(found, "title")
    sentence = (
        "From round 0 to round 2 the held-out score has changed by +3.500 ± 3.500: +1.0 standard errors."
    )
    assert sentence in capsys.readouterr().out
    report.write_markdown(found, "title", tmp_path / "rounds.md")
    text = (tmp_path / "rounds.md").read_text()
    assert sentence in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[-1].startswith(
        "| 2 | 6.500 ± 2.500 | +3.500 ± 2.500 | +3.500 ± 3.500 | 1.00 ± 0.00 | 4.00 ± 0.00 |"
    )
    assert rows[-1].endswith("| 2 / 0 | 100% | 2.5 |")
    report.write_csv(found, tmp_path / "rounds.csv")
    with (tmp_path / "rounds.csv").open() as file:
        first, second, _ = csv.DictReader(file)
    assert (first["score"], first["score_error"], first.get("change")) == ("3.0", "1.0", "")
    assert (second["kl_start"], second["kl_start_error"], second["steps"]) == ("1.0", "0.5", "5")
    report.plot(found, "title", tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".rounds")]


def test_round_0_alone(rounds: list[Round], tmp_path: Path) -> None:
    found = lines(rounds[:1], lambda response: 1)
    report.write_markdown(found, "title", tmp_path / "rounds.md")
    assert "standard errors." not in (tmp_path / "rounds.md").read_text()
    report.write_csv(found, tmp_path / "rounds.csv")
    report.plot(found, "title", tmp_path / "rounds.png")


def test_samples_of_each_round(rounds: list[Round], tmp_path: Path) -> None:
    found = examples(rounds[:3], 9)
    assert [(example.prompt, [text for text, _ in example.samples]) for example in found] == [
        ("Prompt a", ["one", "one", "1"]),
        ("Prompt b", ["", "", "3 3"]),
    ]
    report.write_samples(found, "title", tmp_path / "samples.md")
    text = (tmp_path / "samples.md").read_text()
    assert "## Prompt a\n\nRound 0, score 1.00:\n\n> one\n\nRound 1, score 1.00" in text
    assert "> (nothing)" in text
