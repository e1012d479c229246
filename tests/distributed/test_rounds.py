"""tools/run_rounds.py with a small model: two rounds to their end, and a round that is killed in every stage."""

import csv
import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.helpers.agents import ROOT
from tests.helpers.models import make_llama
from tests.helpers.warm import WarmPython

STAGES = ("sample", "score", "train", "held-out", "held-out-score", "log-probs")
LIMIT = 400

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rounds, with its model and prompts."""
    folder = tmp_path_factory.mktemp("rounds")
    model = make_llama(folder / "model", max_position_embeddings=512, num_hidden_layers=2)
    prompts = folder / "prompts.jsonl"
    lines = [
        {"id": f"p{i}", "split": "train" if i < 12 else "validation", "prompt": f"Name {i} colours.",
         "constraints": [{"type": "max_words", "limit": 3 + i % 7}]}
        for i in range(18)
    ]  # fmt: skip
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "model": str(model),
        "rounds": 2,
        "prompts": {"train": str(prompts), "train_split": "train", "held_out": str(prompts),
                    "held_out_split": "validation", "limit": 6},
        "sample": {"samples": 3, "max-new-tokens": 8},
        "train": {"overrides": {
            "trainer": {"max_epochs": 2, "save_interval": 2, "save_at_end": False, "val_check_interval": 0},
            "exp_manager": {"create_tensorboard_logger": False},
            "model": {"global_batch_size": 2, "max_tokens_per_micro_batch": 512, "optim": {"lr": 1e-3}},
        }},
        "per_round": [None, {"model.optim.lr": 5e-4}],
    }  # fmt: skip
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(python: WarmPython, file: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [str(python.python), str(ROOT / "tools" / "run_rounds.py"), str(file), "--output", str(output)]
    environment = {**os.environ, **python.environment, "PYTHON_EXEC": str(python.python)}
    return subprocess.Popen(
        [*command, *more], env=environment, cwd=file.parent, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, printed
    return printed


def records(output: Path) -> dict[str, dict[str, Any]]:
    """What of each stage that was begun is on the disk, by its name."""
    return {
        str(path.parent.relative_to(output)): json.loads(path.read_text())
        for path in output.glob("round-*/*/stage.json")
    }


@pytest.fixture(scope="module")
def whole(file: Path, warm_python: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of two rounds, and what the command printed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, finish(start(warm_python, file, output))


def test_two_rounds(whole: tuple[Path, str], file: Path, warm_python: WarmPython) -> None:
    output, printed = whole
    found = records(output)
    names = [
        "round-0/held-out",
        "round-0/held-out-score",
        *(f"round-{r}/{s}" for r in (1, 2) for s in STAGES),
    ]
    assert sorted(found) == sorted(names)
    assert all(record["starts"] == 1 and record["made"] for record in found.values())
    assert [line.split()[1] for line in printed.splitlines() if line.endswith("begins")] == [
        f"{name}:" for name in names
    ]
    # Each round trains what the one before has made, with a rate of its own, against its own start.
    models = [file.parent / "model", *(output / f"round-{r}" / "train" / "model" for r in (1, 2))]
    weights = [load_file(folder / "model.safetensors") for folder in models]
    for before, after in itertools.pairwise(weights):
        assert any((before[name] != after[name]).any() for name in before)
    for number, rate in ((1, 1e-3), (2, 5e-4)):
        train = output / f"round-{number}" / "train"
        lines = [
            json.loads(line) for line in (train / "experiment" / "metrics.jsonl").read_text().splitlines()
        ]
        assert lines[0]["split"] == "validation"
        assert lines[0]["reward_margin"] == 0
        assert max(line.get("lr", 0) for line in lines) == pytest.approx(rate)
        assert not (train / "experiment" / "checkpoints").exists()
    # The same held-out prompts and random numbers; other prompts and numbers to train on.
    prompts = [
        [json.loads(line)["id"] for line in (output / "prompts" / name).read_text().splitlines()]
        for name in ("round-1.jsonl", "round-2.jsonl", "held-out.jsonl")
    ]
    assert [len(own) for own in prompts] == [6, 6, 6]
    assert len({name for own in prompts for name in own}) == 18
    assert {found[f"round-{r}/held-out"]["settings"]["seed"] for r in (0, 1, 2)} == {"0"}
    assert [found[f"round-{r}/sample"]["settings"]["seed"] for r in (1, 2)] == ["1", "2"]


def test_the_report(whole: tuple[Path, str]) -> None:
    output, printed = whole
    with (output / "rounds.csv").open() as opened:
        lines = list(csv.DictReader(opened))
    assert [line["number"] for line in lines] == ["0", "1", "2"]
    means = []
    for number, line in enumerate(lines):
        groups = [
            json.loads(text)
            for text in (output / f"round-{number}" / "held-out-score" / "groups.jsonl")
            .read_text()
            .splitlines()
        ]
        scores = [[response["score"] for response in group["responses"]] for group in groups]
        means.append([sum(own) / len(own) for own in scores])
        assert float(line["score"]) == pytest.approx(sum(means[-1]) / len(groups))
        if number:
            changes = [now - before for before, now in zip(means[-2], means[-1], strict=True)]
            assert float(line["change"]) == pytest.approx(sum(changes) / len(changes), abs=1e-12)
            assert [int(line["better"]), int(line["worse"])] == [
                sum(change > 0 for change in changes), sum(change < 0 for change in changes),
            ]  # fmt: skip
            assert line["steps"] == "6"
    # The first round starts from the first policy; the second has moved further than its own step.
    assert lines[1]["kl_start"] == lines[1]["kl_first"]
    assert lines[2]["kl_start"] != lines[2]["kl_first"]
    assert (output / "rounds.png").read_bytes().startswith(b"\x89PNG")
    sentence = "From round 0 to round 2 the held-out score has changed by "
    assert sentence in (output / "rounds.md").read_text()
    assert sentence in printed
    assert "Round 2, score" in (output / "samples.md").read_text()


def test_what_is_done_is_kept_and_nothing_else_goes_under_its_name(
    whole: tuple[Path, str], file: Path, warm_python: WarmPython
) -> None:
    output, _ = whole
    before = records(output)
    printed = finish(start(warm_python, file, output))
    assert printed.count(": kept\n") == len(before)
    assert records(output) == before
    refused = start(warm_python, file, output, "train.overrides.model.mpo.beta=0.3")
    said, _ = refused.communicate(timeout=LIMIT)
    assert refused.returncode == 1
    assert "round-1/train was made with model.mpo.beta=0.1, and now it is model.mpo.beta=0.3: give" in said
    assert records(output) == before


def test_killed_in_every_stage(
    whole: tuple[Path, str], file: Path, warm_python: WarmPython, tmp_path: Path
) -> None:
    """The command is killed in each stage of a round: the next start goes on there, to the same model and figures."""
    output, draw = tmp_path / "out", random.Random(0)
    names = ["round-0/held-out", "round-0/held-out-score", *(f"round-1/{stage}" for stage in STAGES)]
    killed = []
    for name in names:
        process = start(warm_python, file, output, "rounds=1", "per_round=[]")
        end = time.monotonic() + LIMIT
        while name not in records(output):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, name
            time.sleep(0.01)
        if name.endswith("/train"):
            # In the middle: from its first checkpoint on.
            while not any((output / name / "experiment" / "checkpoints").glob("step_*")):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            assert not (output / name / "model").exists()
        else:
            time.sleep(draw.uniform(0, 0.5))
        # One of them is asked to end, as by a keyboard or a scheduler.
        process.send_signal(signal.SIGTERM if name.endswith("1/held-out") else signal.SIGKILL)
        printed, _ = process.communicate(timeout=LIMIT)
        if name.endswith("1/held-out"):
            assert process.returncode == 130, printed
            assert printed.endswith("\nstopped; the same command goes on from here\n")
        if not records(output)[name]["made"]:
            killed.append(name)
        done = {key: record for key, record in records(output).items() if record["made"]}
        assert all(key in names[: names.index(name) + 1] for key in done)
    assert len(killed) > len(names) // 2
    assert "round-1/train" in killed
    finish(start(warm_python, file, output, "rounds=1", "per_round=[]"))
    found, expected = records(output), records(whole[0])
    for name in names:
        assert found[name]["starts"] == (2 if name in killed else 1), name
        assert found[name]["made"] == expected[name]["made"], name
    log = (output / "round-1" / "train" / "stage.log").read_text()
    assert "resumed at step" in log
