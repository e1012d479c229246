"""tools/gpu_suite.sh: its table from real runs of pytest and of the benchmarks, as far as a CPU has what they need."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.machines import NODE
from tools import gpu_suite
from tools.doctor import described
from tools.gpu_table import FAILED, PARITY, SKIPPED, Row, details, markdown, parity_rows, read_cases

ROOT = Path(__file__).parents[3]
# By test, some of the cases that it must have on a GPU.
KINDS = {
    "test_libraries.py::test_a_machine_trains_with_what_it_has": {"FlashAttention 2 alone", "no apex"},
    "test_attention.py::test_backend_computes_the_definition": {
        "varlen-64-all",
        "te-128-none",
        "sdpa-64-some",
    },
    "test_layers.py::test_layers_give_the_gradients_of_one_rank": {"te-tp2", "te-pp2", "local-pp2 vpp2"},
    "test_layers.py::test_bfloat16_is_near": {"te-te-1", "local-varlen-tp2"},
    "test_rope.py::test_each_token_is_turned_by_its_own_position": {"True-bf16"},
    "test_head.py::test_head_is_precise": {"gpu-eager", "gpu-triton"},
    "test_head.py::test_any_size": {"gpu-triton-size7"},
    "test_repeats.py::test_a_row_gives_the_same_numbers": {"te-varlen"},
    "test_checkpoint.py::test_a_checkpoint_takes_little_memory": {"1B-1", "1B-2"},
    "test_waits.py::test_a_row_waits_for_nothing": {"te-te"},
    "test_fp8.py::test_it_is_near_bf16_and_margins_are_zero": {"1-tensorwise", "1-blockwise", "1-mxfp8"},
    "test_long_rows.py::test_nothing_overflows": {"te-te"},
    "test_overlap.py::test_both_ways_train_alike": {"overlap"},
}
A_TEST = """
import json, pytest

def note(record_property, value, at_most):
    record_property("measured", json.dumps({"what": "keys", "value": value, "at_most": at_most}))

@pytest.mark.parametrize("value", [0.2, 0.4])
def test_within(value, record_property):
    note(record_property, value, 0.5)

def test_beyond(record_property):
    note(record_property, 2.0, 0.5)
    raise ValueError("ranks failed\\n\\n--- rank 1 ---\\n  here\\nRuntimeError: no kernel\\n--- rank 1, output ---")

def test_no_number(record_property):
    note(record_property, 0.1, 0.5)
    note(record_property, float("nan"), 0.5)

def test_absent():
    pytest.skip("needs 2 GPUs | and here is 1")

@pytest.fixture
def broken():
    raise OSError("no driver")

def test_unreached(broken): ...
"""


def pytest_of_the_suite(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pytest", *gpu_suite.PYTEST, *arguments], cwd=ROOT, text=True, capture_output=True,
        timeout=200, check=False,
    )  # fmt: skip


def test_rows_of_a_report(tmp_path: Path) -> None:
    test, junit = tmp_path / "test_kernel.py", tmp_path / "junit.xml"
    test.write_text(A_TEST)
    assert pytest_of_the_suite(f"--junitxml={junit}", str(test)).returncode == 1
    cases = read_cases(junit.read_text())
    rows = {row.what: row for row in parity_rows(cases)}
    assert rows["kernel: within"] == Row(PARITY, "kernel: within", "", "2 passed", "keys 0.4 (<= 0.5)")
    assert rows["kernel: absent"].result == "1 skipped"
    assert rows["kernel: absent"].note == "needs 2 GPUs | and here is 1"
    beyond = rows["kernel: beyond"]
    assert (beyond.result, beyond.measured) == (FAILED, "keys 2 (<= 0.5)")
    assert beyond.note == "ValueError: ranks failed ... RuntimeError: no kernel"
    assert rows["kernel: no number"].measured == "keys nan (<= 0.5)"
    assert rows["kernel: unreached"].result == FAILED
    assert "no driver" in rows["kernel: unreached"].note

    page = markdown(rows.values(), "today", ["python  3.12"], [details(cases)])
    table = [line for line in page.splitlines() if line.startswith("| parity")]
    # A bar within a cell is no end of it.
    assert {len(re.split(r"(?<!\\)\|", line)) for line in table} == {8}
    assert len(table) == len(rows)
    assert "### kernel: beyond" in page
    assert "RuntimeError: no kernel" in page.partition("## Failures")[2]


def test_what_the_heading_says_of_a_machine() -> None:
    head = gpu_suite.heading(described(NODE), 42.4)
    for part in (NODE.gpus[0].name, "driver 580.95.05, CUDA up to 13.0", "torch 2.13.0, built for CUDA 13.0"):
        assert part in head
    assert "42 minutes" in head
    assert "Transformer Engine 2.16.0" in head
    assert "GPUs none" in gpu_suite.heading(described(replace(NODE, gpus=())), 1)


def test_the_tests_that_a_gpu_is_for_are_there() -> None:
    done = pytest_of_the_suite("tests/gpu", "-m", "gpu", "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.partition("[") for line in done.stdout.splitlines()]
    for name, cases in KINDS.items():
        parameters = [rest for test, _, rest in found if test == f"tests/gpu/{name}"]
        for case in cases:
            assert any(case in one for one in parameters), f"{name}: {case} is not in {parameters}"


def test_a_benchmark_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tmp_path / "tables.md"
    wrong = replace(gpu_suite.BENCHMARKS["mfu"], on_cpu=("--layers", "4", "2"))
    monkeypatch.setitem(gpu_suite.BENCHMARKS, "mfu", wrong)
    left_out, failed = gpu_suite.benchmark("mfu", on_gpu=False, quick=True, tables=tables)
    assert left_out == Row("mfu", "mfu", "GPU", SKIPPED, note=gpu_suite.NO_GPU)
    assert failed.result == FAILED
    assert failed.note.startswith("error: --layers 4 2 must be two numbers of layers")
    # What a chip lacks is no failure: here that there is none.
    (lacking,) = gpu_suite.benchmark("mfu-fp8", on_gpu=True, quick=True, tables=tables)
    assert lacking.result == SKIPPED
    assert lacking.note.startswith("error: --fp8 is of Transformer Engine's layers: ")


def suite(*arguments: str, python: str = sys.executable) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "tools/gpu_suite.sh", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=280, check=False,
        env={**os.environ, "MPO_PYTHON": python},
    )  # fmt: skip


@pytest.mark.slow
def test_parts_of_the_suite_on_this_machine(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    done = suite(str(output), "--only", PARITY, "two-pass", "--tests", "rope")
    assert done.returncode == 0, done.stdout + done.stderr
    page = output.read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "passed" in line]
    assert any("rope: each token" in row[1] and "rotated" in row[4] for row in rows)
    assert {row[0].removeprefix("| ") for row in rows} >= {PARITY, "two-pass"}
    assert "### two-pass" in page
    assert "megatron-core" in page
    assert FAILED not in page


@pytest.mark.slow
def test_a_failure_is_the_exit_status(tmp_path: Path) -> None:
    done = suite(str(tmp_path / "results.md"), "--only", PARITY, "--tests", "no_test_of_this_name")
    assert done.returncode == 1
    assert "1 rows failed; the table is in" in done.stdout
    assert "pytest ended with status 5" in (tmp_path / "results.md").read_text()


def test_help_and_a_python_without_what_it_needs(tmp_path: Path) -> None:
    helped = suite("--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith("One command for the first hour on a GPU")
    assert "--only parity --tests rope" in helped.stdout
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    refused = suite(python=str(bare))
    assert refused.returncode == 1
    assert "lacks pytest, torch or megatron-core" in refused.stderr
