"""The main job, whole, on a small model: layouts agree, step 0 is exact, a run resumes, wrong input is one sentence."""

import contextlib
import gzip
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_megatron.runtime.commands import JOB
from mpo_megatron.scheduling.rows import RowSource
from tests.helpers.main_job import (
    arguments,
    exact,
    job,
    job_killed_after,
    metrics,
    printed,
    wait_for,
)
from tests.helpers.warm import WarmPython


@pytest.fixture(scope="module")
def one_rank(inputs: dict[str, Path], ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    assert ranks(1).run(job, arguments(inputs, folder), timeout=240) == [""]
    return folder


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (2, ["model.pipeline_model_parallel_size=2"]),
        (2, []),
        (2, ["model.tensor_model_parallel_size=2"]),
        (4, ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]),
        (2, ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"]),
        (
            3,
            [
                "model.pipeline_model_parallel_size=3",
                "model.num_layers_in_first_pipeline_stage=1",
                "model.num_layers_in_last_pipeline_stage=1",
            ],
        ),
        (4, ["model.context_parallel_size=2"]),
    ],
    ids=["pp2", "dp2", "tp2", "tp2-pp2", "pp2-vpp2", "pp3-uneven", "cp2-dp2"],
)
def test_layouts_train_alike(
    world: int, more: list[str], inputs: dict[str, Path], one_rank: Path, ranks: Any, tmp_path: Path
) -> None:
    assert ranks(world).run(job, arguments(inputs, tmp_path, *more), timeout=240) == [""] * world
    ours, theirs = metrics(tmp_path), metrics(one_rank)
    assert [line["step"] for line in ours] == list(range(1, 11))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-5)
    assert ours[9]["loss"] == pytest.approx(theirs[9]["loss"], abs=1e-3)
    assert abs(ours[9]["loss"] - ours[0]["loss"]) > 0.02
    for folder in (tmp_path, one_rank):
        assert metrics(folder)[0]["reward_margin"] == 0.0
        before, *_, after = metrics(folder, "validation")
        assert (before["step"], before["reward_margin"], before["accuracy"]) == (0, 0.0, 0.5)
        assert after["reward_margin"] > 0
    logits = [
        AutoModelForCausalLM.from_pretrained(f / "hf")(torch.arange(40)[None]).logits
        for f in (tmp_path, one_rank)
    ]
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)


def test_groups_larger_than_a_row_train_as_whole_ones(
    inputs: dict[str, Path], one_rank: Path, ranks: Any, tmp_path: Path
) -> None:
    """Rows too short for some groups: the same losses, margins that start at exactly 0, and the log says how many."""
    assert ranks(2).run(
        job, arguments(inputs, tmp_path, "model.max_tokens_per_micro_batch=48"), timeout=240
    ) == ["", ""]
    ours, theirs = metrics(tmp_path), metrics(one_rank)
    assert ours[0]["split_groups"] >= 3
    assert theirs[0]["split_groups"] == 0
    assert ours[0]["reward_margin"] == 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
    for a, b in zip(metrics(tmp_path, "validation"), metrics(one_rank, "validation"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)


@pytest.mark.parametrize("shared", ["true", "false"])
def test_the_first_mpo_loss_is_that_of_the_counts(
    shared: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    more = ["model.mpo.objective=mpo", "model.mpo.alpha=null", "trainer.max_steps=1", "model.global_batch_size=40",
            f"model.pack.shared_prompt={shared}"]  # fmt: skip
    assert ranks(2).run(job, arguments(inputs, tmp_path, *more), timeout=240) == ["", ""]
    expected = []
    for line in inputs["train"].read_text().splitlines():
        scores = [response["score"] for response in json.loads(line)["responses"]]
        preferred = sum(score > np.mean(scores) for score in scores)
        if preferred:
            expected.append(math.log(len(scores) / preferred))
    (first,) = metrics(tmp_path)
    assert first["loss"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert first["reward_margin"] == first["preferred_reward"] == first["dispreferred_reward"] == 0.0


def test_a_run_that_stopped_resumes_at_another_layout(
    inputs: dict[str, Path], one_rank: Path, ranks: Any, tmp_path: Path
) -> None:
    """Two ranks stop in the middle; one goes on, and the curve is that of the run that did not stop."""
    kept = ["trainer.save_interval=4", "exp_manager.resume_if_exists=true"]
    stop = arguments(inputs, tmp_path, *kept, "model.pipeline_model_parallel_size=2")
    lines = (tmp_path / "lines").absolute()
    assert ranks(2).run(job_killed_after, stop, 6, lines, timeout=240) == ["stopped", "stopped"]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert ranks(1).run(job, arguments(inputs, tmp_path, *kept), timeout=240) == [""]
    resumed, straight = metrics(tmp_path), metrics(one_rank)
    assert [line["step"] for line in resumed] == list(range(1, 11))
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
        assert ours["lr"] == pytest.approx(theirs["lr"])


def test_a_run_that_came_to_no_checkpoint_starts_anew(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """Nothing of the start before is left: of its metrics, or of what its validations have written."""
    more = ["exp_manager.resume_if_exists=true", "trainer.save_at_end=false", "trainer.val_check_interval=0",
            "trainer.log_val_groups=true"]  # fmt: skip
    for steps in (2, 1):
        overrides = arguments(inputs, tmp_path, *more, f"trainer.max_steps={steps}")
        assert ranks(1).run(job, overrides, timeout=240) == [""]
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2][:steps]
        assert [line["step"] for line in metrics(tmp_path, "validation")] == [0, steps]
        files = {path.name for path in (tmp_path / "validation").iterdir()}
        assert files == {"step_0000000.jsonl", f"step_000000{steps}.jsonl"}


def test_resuming_another_run_is_refused_and_a_new_learning_rate_is_taken(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    more = [
        "exp_manager.resume_if_exists=true",
        "model.optim.sched.name=Constant",
        "model.optim.sched.warmup_ratio=0",
    ]
    assert ranks(1).run(job, arguments(inputs, tmp_path, *more, "trainer.max_steps=2"), timeout=240) == [""]
    again = [*more, "trainer.max_steps=3", "model.optim.lr=5e-4"]
    assert ranks(1).run(job, arguments(inputs, tmp_path, *again), timeout=240) == [""]
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx([1e-3, 1e-3, 5e-4])
    for other in ("trainer.seed=5", "model.global_batch_size=4", f"model.data.train={inputs['validation']}"):
        (error,) = ranks(1).run(job, arguments(inputs, tmp_path, *again, other), timeout=240)
        assert f"saved with another {other.split('=')[0]}" in error


def test_an_export_takes_the_place_of_no_other_folder(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "draft.txt").touch()
    for path, message in ((inputs["model"], "would replace"), (inputs["model"].parent, "would replace"),
                          (tmp_path / "papers", "is not a model's folder")):  # fmt: skip
        (error,) = ranks(1).run(
            job, arguments(inputs, tmp_path / "run", f"model.export_path={path}"), timeout=120
        )
        assert message in error
    assert (tmp_path / "papers" / "draft.txt").exists()


def test_the_command_itself_prints_one_sentence(
    inputs: dict[str, Path], warm_python: WarmPython, tmp_path: Path
) -> None:
    """examples/mpo_gpt.py as a process: a key that Hydra would refuse, and a rule that only the job knows.

    The first process is a fresh one, which has imported nothing.
    """
    for python, override, message in (
        (sys.executable, "model.mpo.bta=1", "error: unknown key model.mpo.bta; did you mean model.mpo.beta?"),
        (
            str(warm_python.python),
            "model.restore_from_path=nowhere",
            "error: model.restore_from_path=nowhere: ",
        ),
    ):
        command = [python, str(JOB), *arguments(inputs, tmp_path / "run", override)]
        environment = {**os.environ, **warm_python.environment}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(message)
        assert "Traceback" not in done.stderr + done.stdout


def job_that_waits_for_the_next_reading(overrides: list[str]) -> tuple[str, int]:
    """Run the job where a training step of each rank ends when another thread has read the next step's groups.

    Returns:
        (the user's error or nothing, the steps that have waited)
    """
    from mpo_megatron.training import trainer

    read: dict[int, threading.Event] = {}
    stage, step, waited = RowSource.stage, trainer.train_step, []

    def staged(source: RowSource, positions: Any) -> Any:
        found = stage(source, positions)
        assert threading.current_thread() is not threading.main_thread()
        read.setdefault(positions.tobytes(), threading.Event()).set()
        return found

    def waiting(current: Any, number: int, *more: Any) -> dict[str, float]:
        values = step(current, number, *more)
        if number < current.total_steps:
            following = current.setup.train.steps[number].tobytes()
            assert read.setdefault(following, threading.Event()).wait(60)
            waited.append(number)
        return values

    RowSource.stage, trainer.train_step = staged, waiting  # type: ignore[method-assign,assignment]
    try:
        return job(overrides), len(waited)
    finally:
        RowSource.stage, trainer.train_step = stage, step  # type: ignore[method-assign]


def test_the_next_steps_groups_are_read_during_a_step(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """With no thread the first step would wait in vain."""
    more = ["trainer.max_steps=4", "trainer.val_check_interval=2", "model.data.prefetch_factor=1"]
    found = ranks(2).run(job_that_waits_for_the_next_reading, arguments(inputs, tmp_path, *more), timeout=240)
    assert found == [("", 3)] * 2


@pytest.mark.parametrize(
    ("world", "more"),
    [(2, []), (2, ["model.pipeline_model_parallel_size=2"]), (2, ["model.max_tokens_per_micro_batch=48"])],
    ids=["dp2", "pp2", "split groups"],
)
def test_rows_made_ahead_train_as_rows_made_in_the_step(
    world: int, more: list[str], inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """To the last bit: reference, training, validation and the weights at the end."""
    for ahead in (0, 2):
        own = [*more, "trainer.max_steps=6", "trainer.val_check_interval=3",
               f"model.data.cache_dir={tmp_path / 'cache'}", f"model.data.prefetch_factor={ahead}"]  # fmt: skip
        shutil.rmtree(tmp_path / "cache" / "reference", ignore_errors=True)
        overrides = arguments(inputs, tmp_path / str(ahead), *own)
        assert ranks(world).run(job, overrides, timeout=240) == [""] * world
    for split in ("train", "validation"):
        assert exact(tmp_path / "0", split) == exact(tmp_path / "2", split)
    ours, theirs = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("2", "0"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def job_with_a_cache_of_each_rank(overrides: list[str], cache: Path, stop: int = -1) -> tuple[str, int, str]:
    """Run the job with another cache folder on each rank, as nodes without shared storage have.

    Args:
        stop: steps of the reference passes after which the job is stopped by an exception, as by a crash; -1: none.

    Returns:
        (the user's error or nothing, reference steps that this rank has computed, what it has printed)
    """
    from mpo_megatron.training import reference

    class Crash(Exception):
        pass

    response_logps, steps = reference.response_logps, 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal steps
        if steps == stop:
            raise Crash
        steps += 1
        return response_logps(*args)

    reference.response_logps = counted  # type: ignore[assignment]
    error = "stopped"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(Crash):
            error = job([*overrides, f"model.data.cache_dir={cache / os.environ['RANK']}"])
    finally:
        reference.response_logps = response_logps
    return error, steps, output.getvalue()


def cached_logps(cache: Path) -> dict[str, bytes]:
    """Of rank 0, by the files' names."""
    return {
        path.name: path.read_bytes() for path in (cache / "0" / "reference").rglob("*.*") if path.is_file()
    }


def test_a_reference_pass_that_was_stopped_goes_on(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """Five training steps and two of validation, on ranks that do not see each other's cache; stopped after three."""
    more = ["model.pipeline_model_parallel_size=2", "model.global_batch_size=8", "trainer.max_steps=5",
            "trainer.save_at_end=false"]  # fmt: skip
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    overrides = arguments(inputs, tmp_path / "run", *more)
    stopped = ranks(2).run(job_with_a_cache_of_each_rank, overrides, broken, 3, timeout=240)
    assert [found[:2] for found in stopped] == [("stopped", 3)] * 2
    (name,) = cached_logps(broken)
    assert name.endswith(".journal")
    resumed = ranks(2).run(job_with_a_cache_of_each_rank, overrides, broken, timeout=240)
    assert [found[:2] for found in resumed] == [("", 2 + 2)] * 2
    assert "reference   train: goes on after 3 of 5 steps" in resumed[0][2]
    overrides = arguments(inputs, tmp_path / "other", *more)
    unbroken = ranks(2).run(job_with_a_cache_of_each_rank, overrides, straight, timeout=240)
    assert [found[:2] for found in unbroken] == [("", 5 + 2)] * 2
    assert cached_logps(broken) == cached_logps(straight)
    assert len(cached_logps(broken)) == 2
    assert not (broken / "1" / "reference").exists()
    assert exact(tmp_path / "run") == exact(tmp_path / "other")
    assert metrics(tmp_path / "run")[0]["reward_margin"] == 0.0


def test_a_reference_of_other_rows_does_where_exactness_is_not_asked_for(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """Two steps of 8 groups at one layout; then five at another, in rows of another length: three are computed."""
    more = ["model.global_batch_size=8", "trainer.save_at_end=false", "model.data.validation=null"]
    first = arguments(inputs, tmp_path / "first", *more, "trainer.max_steps=2")
    ((error, steps, _),) = ranks(1).run(job_with_a_cache_of_each_rank, first, tmp_path / "cache", timeout=240)
    assert (error, steps) == ("", 2)
    more += ["trainer.max_steps=5", "model.max_tokens_per_micro_batch=200"]
    for exactly, computed in (("false", 3), ("true", 5)):
        overrides = arguments(inputs, tmp_path / exactly, *more, f"model.mpo.reference_exact={exactly}")
        found = ranks(2).run(job_with_a_cache_of_each_rank, overrides, tmp_path / "cache", timeout=240)
        assert [one[:2] for one in found] == [("", computed)] * 2
        assert ("margins at step 0 need not be exactly 0" in found[0][2]) == (exactly == "false")
    loose, strict = metrics(tmp_path / "false"), metrics(tmp_path / "true")
    assert loose[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert strict[0]["reward_margin"] == 0.0
    assert [line["loss"] for line in loose] == pytest.approx([line["loss"] for line in strict], abs=1e-4)


def traced(folder: Path, rank: int) -> dict[str, int]:
    """How often each range and operation is in a rank's trace."""
    (path,) = (folder / "profile").glob(f"rank{rank}_*.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") in ("user_annotation", "cpu_op"))


def test_a_profile_shows_the_parts_of_its_steps(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    """A trace of steps 2 and 3 on the last of two pipeline stages; the numbers are those without it."""
    more = ["model.pipeline_model_parallel_size=2", "trainer.max_steps=5", "model.data.validation=null",
            "model.global_batch_size=16"]  # fmt: skip
    window = ["model.profile.enabled=true", "model.profile.start_step=2", "model.profile.end_step=3",
              "model.profile.ranks=[1]"]  # fmt: skip
    first, second = ranks(2).run(printed, arguments(inputs, tmp_path / "with", *more, *window), timeout=240)
    assert f"profile     of ranks 1 in {tmp_path / 'with' / 'profile'}" in first
    assert second == ""
    assert [path.name for path in (tmp_path / "with" / "profile").iterdir()] == ["rank1_steps2-3.json.gz"]
    found, steps = traced(tmp_path / "with", 1), metrics(tmp_path / "with")
    rows = int(steps[1]["rows"] + steps[2]["rows"])
    once_a_step = {"rows", "optimizer", "forward-backward", "all-grads-sync", "optimizer-inner-step"}
    assert {name: found[name] for name in once_a_step} == dict.fromkeys(once_a_step, 2)
    assert (found["step 1"], found["step 2"], found["step 3"], found["step 4"]) == (0, 1, 1, 0)
    assert (found["forward-compute"], found["backward-compute"]) == (rows, rows)
    assert found["plan"] == found["read and pack"] > 0  # by another thread
    assert found["aten::mm"] > rows
    assert ranks(2).run(job, arguments(inputs, tmp_path / "without", *more), timeout=240) == ["", ""]
    assert not (tmp_path / "without" / "profile").exists()
    assert exact(tmp_path / "with") == exact(tmp_path / "without")


def test_bars_show_on_rank_0(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    """In a log file a bar is one line, of which the last state shows."""
    more = ["model.pipeline_model_parallel_size=2", "trainer.max_steps=1", "model.data.validation=null"]
    first, second = ranks(2).run(printed, arguments(inputs, tmp_path, *more), timeout=240)
    bars = {line.rpartition("\r")[2] for line in first.splitlines()}
    # Of four layers of six parameters each and the embedding, this stage has two layers and the embedding.
    for start, end in (
        ("weights: 100%", " 13/13 "),
        ("reference, train: 100%", " 1/1 "),
        ("training: 100%", " 1/1 "),
    ):
        assert any(bar.startswith(start) and end in bar for bar in bars), bars
    assert second == ""


def test_bfloat16_and_the_other_objective_run(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    more = ["trainer.precision=bf16", "model.mpo.objective=mpo", "~model.mpo.alpha", "trainer.max_steps=2"]
    assert ranks(2).run(job, arguments(inputs, tmp_path, *more), timeout=240) == ["", ""]
    assert metrics(tmp_path)[0]["reward_margin"] == 0.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    names = {path.name for path in tmp_path.iterdir()}
    assert {"metrics.jsonl", "training.png", "hf", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    keys = {
        "step",
        "split",
        "loss",
        "reward_margin",
        "accuracy",
        "grad_norm",
        "lr",
        "groups_per_second",
        "tokens_per_second",
        "tflops",
        "mfu",
        "peak_memory",
    }
    assert keys <= metrics(tmp_path)[0].keys()


def test_the_plan_is_said_before_and_what_is_achieved_beside(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    more = ["model.tensor_model_parallel_size=2", "trainer.max_steps=2", "model.data.validation=null"]
    first, second = ranks(2).run(printed, arguments(inputs, tmp_path, *more), timeout=240)
    lines = first.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("planned ")]
    assert re.search(
        r"GiB on each rank of the largest stage: weights .* activations .* temporary", lines[start]
    )
    (flops,) = re.findall(r"([\d.e+-]+) TFLOP in the first step, ([\d.e+-]+) with repeated", lines[start + 1])
    assert 0 < float(flops[0]) < float(flops[1])
    assert "GB of TP all-gather" in lines[start + 1]
    assert "GFLOP/s a rank, measured in matrix products now" in lines[start + 2]
    assert "planned" not in second
    for line in metrics(tmp_path):
        assert 0 < line["mfu"] < 1.5  # of a rank's own products, on processors that others use too
        assert line["peak_memory"] > 2**26  # torch alone takes more
    rate = metrics(tmp_path)[0]["tflops"] * metrics(tmp_path)[0]["seconds"] * 2
    assert rate == pytest.approx(float(flops[0]), rel=1e-3)


def test_without_a_reference_no_pass_computes_it(inputs: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    more = ["model.mpo.objective=simpo", "model.mpo.alpha=null", "model.mpo.beta=2", "model.mpo.gamma=0.5",
            "model.mpo.reference=none", "model.mpo.sft_weight=0.1", "trainer.max_steps=10",
            f"model.data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    first, _ = ranks(2).run(printed, arguments(inputs, tmp_path / "run", *more), timeout=240)
    assert "simpo, beta 2.0, gamma 0.5, pairs best_worst, label_smoothing 0.0, SFT on the best" in first
    assert "reference, train" not in first
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"data"}
    lines = metrics(tmp_path / "run")
    assert all(math.isfinite(value) for value in lines[0].values() if isinstance(value, float))
    assert lines[0]["reward_margin"] != 0.0
    before, *_, after = metrics(tmp_path / "run", "validation")
    assert after["loss"] < before["loss"]


def test_kto_sees_the_whole_batch_at_every_layout(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    more = ["model.mpo.objective=kto", "model.mpo.alpha=null", "model.global_batch_size=8", "trainer.max_steps=5",
            "trainer.val_check_interval=0"]  # fmt: skip
    for world, name in ((1, "one"), (2, "two")):
        small = ["model.max_tokens_per_micro_batch=64"] if world == 2 else []
        overrides = arguments(inputs, tmp_path / name, *more, *small)
        assert ranks(world).run(job, overrides, timeout=240) == [""] * world
    for split in ("train", "validation"):
        one, two = metrics(tmp_path / "one", split), metrics(tmp_path / "two", split)
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-5)
        # Untrained: 1 - sigma(0), exactly.
        assert two[0]["loss"] == one[0]["loss"] == 0.5
        assert abs(two[-1]["loss"] - 0.5) > 1e-3


def test_groups_of_equal_scores_count_where_scores_alone_do(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in inputs["train"].read_text().splitlines()[:8]]
    for response in lines[2]["responses"]:
        response["score"] = 3.0
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = [
        f"model.data.train={tmp_path / 'train.jsonl'}",
        "trainer.max_steps=1",
        "model.data.validation=null",
    ]
    skipped = ranks(1).run(printed, arguments(inputs, tmp_path / "wmpo", *more), timeout=240)[0]
    assert "7 of 8 groups kept" in skipped
    assert "1 groups skipped for lack of a preferred response" in skipped
    more += ["model.mpo.objective=infonca", "model.mpo.alpha=1"]
    kept = ranks(1).run(printed, arguments(inputs, tmp_path / "infonca", *more), timeout=240)[0]
    assert "8 of 8 groups kept" in kept
    assert "1 groups kept without a preferred response" in kept
    # At the start the loss is the log of the group's size.
    sizes = [len(line["responses"]) for line in lines]
    assert metrics(tmp_path / "infonca")[0]["loss"] == pytest.approx(np.mean(np.log(sizes)), abs=1e-6)
    assert metrics(tmp_path / "infonca")[0]["accuracy"] == 0.5


WRONG_LINES = {
    '{"id": "x", "prompt": "a", ': r"bad.jsonl:2",
    '{"id": "x", "prompt": "a", "responses": [{"text": "b", "score": NaN}, {"text": "c", "score": 1}]}': "bad.jsonl:2",
    '{"id": "x", "prompt": "a", "responses": [{"text": " ", "score": 2}, {"text": "c", "score": 1}]}': "bad.jsonl:2",
    '{"id": "x", "prompt": "a", "responses": [{"text": "c", "score": 1}]}': "bad.jsonl:2",
    json.dumps(
        {"prompt": "dog " * 400, "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}
    ): "bad.jsonl:2",
}


@pytest.mark.parametrize("number", range(len(WRONG_LINES)))
def test_bad_data_stops_all_ranks_with_file_and_line(
    number: int, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    line, place = list(WRONG_LINES.items())[number]
    good = inputs["train"].read_text().splitlines()[0]
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    more = [f"model.data.train={tmp_path / 'bad.jsonl'}"]
    first, second = ranks(2).run(job, arguments(inputs, tmp_path / "run", *more), timeout=120)
    assert place in first
    assert first == second
    assert "\n" not in first
    assert not (tmp_path / "run").exists()


def test_data_at_fault_are_left_out_where_it_is_asked_for(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """The run is that of the good lines alone, to the last bit, and its folder says what was left out."""
    lines = inputs["train"].read_text().splitlines()
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    wrong = [line for pair in zip(WRONG_LINES, lines, strict=False) for line in pair]
    (tmp_path / "data.jsonl").write_text(
        "".join(f"{line}\n" for line in [*wrong, *lines[len(WRONG_LINES) :]])
    )
    skips = [f"model.data.faults.{name}=skip" for name in ("unreadable", "shape", "score", "empty")]
    for folder, more in ((tmp_path / "good", []), (tmp_path, ["model.data.truncation=skip", *skips])):
        more = [f"model.data.train={folder / 'data.jsonl'}", "trainer.max_steps=3", *more]
        (output,) = ranks(1).run(printed, arguments(inputs, folder / "run", *more), timeout=240)
    report = tmp_path / "run" / "skipped_train.jsonl"
    assert f"left out    of train, each with its reason: {report}" in output
    assert "40 of 45 groups kept" in output
    found = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted(line["fault"] for line in found) == ["empty", "long_prompt", "score", "shape", "unreadable"]
    assert {line["where"] for line in found} == {f"{tmp_path / 'data.jsonl'}:{n}" for n in (1, 3, 5, 7, 9)}
    assert exact(tmp_path / "run") == exact(tmp_path / "good" / "run")
    assert not (tmp_path / "good" / "run" / "skipped_train.jsonl").exists()


def test_start_from_checkpoints(inputs: dict[str, Path], one_rank: Path, ranks: Any, tmp_path: Path) -> None:
    """From what `import_hf` makes as from the folder itself, and from a run's checkpoint as from its export."""
    from mpo_megatron.conversion.convert import import_hf

    def first_losses(start: Path, name: str) -> list[float]:
        more = ["trainer.max_steps=2", "trainer.save_at_end=false", "model.tensor_model_parallel_size=2"]
        overrides = arguments({**inputs, "model": start}, tmp_path / name, *more)
        assert ranks(2).run(job, overrides, timeout=240) == ["", ""]
        return [line["loss"] for line in metrics(tmp_path / name)]

    import_hf(inputs["model"], tmp_path / "imported")
    assert first_losses(tmp_path / "imported", "a") == first_losses(inputs["model"], "b")
    trained = first_losses(one_rank / "checkpoints" / "step_0000010", "c")
    assert trained == first_losses(one_rank / "hf", "d")
    assert trained != [line["loss"] for line in metrics(tmp_path / "a")]
    assert (tmp_path / "c" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("background", ["true", "false"])
def test_every_checkpoint_is_exported_beside_the_run(
    background: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    more = ["trainer.max_steps=3", "trainer.save_interval=2", "model.export_at_save=true",
            f"trainer.checkpoint.async_save={background}"]  # fmt: skip
    assert ranks(2).run(
        job, arguments(inputs, tmp_path, *more, "model.tensor_model_parallel_size=2"), timeout=240
    ) == ["", ""]
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["step_0000002", "step_0000003"]
    weights = [
        load_file(tmp_path / name / "model.safetensors")
        for name in ("exports/step_0000002", "exports/step_0000003", "hf")
    ]
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[2])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[2])
    AutoTokenizer.from_pretrained(tmp_path / "exports" / "step_0000002")


@pytest.mark.parametrize("background", ["true", "false"])
def test_the_best_and_the_newest_checkpoints_are_kept(
    background: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """The largest losses, so that they are not the newest ones; validated at each checkpoint, across a restart."""
    # An export starts a program for each checkpoint.
    more = ["trainer.max_steps=5", "trainer.save_interval=1", "exp_manager.resume_if_exists=true",
            "trainer.checkpoint.save_top_k=1", "trainer.checkpoint.mode=max", "trainer.checkpoint.most_recent_k=2",
            f"model.export_at_save={background}", "trainer.val_check_interval=0",
            f"trainer.checkpoint.async_save={background}"]  # fmt: skip
    overrides = arguments(inputs, tmp_path, *more)
    checkpoints = tmp_path / "checkpoints"
    assert ranks(2).run(job_killed_after, overrides, 3, tmp_path, timeout=240) == ["stopped", "stopped"]
    (checkpoints / ".step_0000004-abc").mkdir()
    # They outlive the run, but those that have not begun to read hold nothing yet.
    if background == "true":
        wait_for(*(tmp_path / "exports" / path.name for path in checkpoints.glob("step_*")))
    assert ranks(2).run(job, overrides, timeout=240) == ["", ""]
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path, "validation") if line["step"]}
    assert list(losses) == list(range(1, 6))
    expected = {*sorted(losses, key=lambda step: -losses[step])[:1], 4, 5}
    assert len(expected) > 2
    assert {path.name for path in checkpoints.iterdir()} == {f"step_{step:07d}" for step in expected}
    if background == "true":
        assert {path.name for path in (tmp_path / "exports").iterdir()} == {
            f"step_{step:07d}" for step in losses
        }
    for path in checkpoints.iterdir():
        step = int(path.name.removeprefix("step_"))
        assert json.loads((path / "validation.json").read_text())["loss"] == losses[step]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mpo.bta=1", "unknown key model.mpo.bta; did you mean model.mpo.beta?"),
        ("model.tensor_model_parallel_size=4", "4 attention heads and 2 key-value heads; use one of 1, 2"),
        ("model.tensor_model_parallel_size=2", "1 rank cannot be cut into models of tensor 2"),
        ("model.data.train=absent.jsonl", "absent.jsonl"),
        ("model.export_path=/dev/null/model", "/dev/null/model cannot be written (File exists)"),
        ("model.restore_from_path=nowhere", "nowhere is neither a Hugging Face folder (it has no config.json) nor"),
        ("model.mpo.objective=dpoo", "model.mpo.objective=dpoo is not known; choose one of dpo, dpo_all_pairs"),
        ("model.mpo.objective=simpo", "add model.mpo.alpha=null model.mpo.gamma=... to the command"),
        ("model.mpo.reference=none", "model.mpo.reference=none: the objective wmpo compares with a reference"),
        ("model.mpo.partition=modus", "modus"),
        ("model.max_tokens_per_micro_batch=16", "model.max_tokens_per_micro_batch=16 is less than"),
        ("model.profile={enabled: true, ranks: [1]}", "model.profile.ranks=[1] are numbers from 0 to 0"),
        ("model.profile={enabled: true, end_step: 12}", "model.profile.end_step=12 is after the last of the run's 10"),
        ("model.nsys_profile.enabled=true", "model.nsys_profile.enabled=true is for Nsight Systems, on a GPU"),
        ("trainer.devices=3", "is not the 1 ranks that torchrun started"),
        ("model.data.max_length=4096", "is above the model's max_position_embeddings=512"),
    ],
)  # fmt: skip
def test_wrong_configuration_is_one_sentence(
    override: str, message: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    (error,) = ranks(1).run(job, arguments(inputs, tmp_path / "run", override), timeout=120)
    assert message in error
    assert "\n" not in error


def test_broken_weights_stop_all_ranks_before_the_data_are_tokenised(
    inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    weights = shutil.copytree(inputs["model"], tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    more = [f"model.restore_from_path={weights.parent}", f"model.data.cache_dir={tmp_path / 'cache'}"]
    errors = ranks(2).run(job, arguments(inputs, tmp_path / "run", *more), timeout=120)
    assert f"{weights} cannot be read" in errors[0]
    assert errors == [errors[0]] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("asked", ["model.attention_backend=te", "model.transformer_impl=transformer_engine"])
def test_what_the_machine_lacks_stops_the_run_before_it_leaves_a_trace(
    asked: str, inputs: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    (error,) = ranks(1).run(job, arguments(inputs, tmp_path / "run", asked), timeout=120)
    assert re.match(f"{asked}: .* needs a GPU; mend that, or set", error)
    assert not (tmp_path / "run").exists()
