"""tests/unit/data/fuzz_reader.py: many inputs without a finding, and that it finds what is there to be found."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fuzzing import MULTIPLE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this machine"
)
ROOT = Path(__file__).parents[3]
RUNS = 10_000
PLANTED = """
import sys
from tests.unit.data.fuzz_reader import main  # which has mpo_megatron.data instrumented
from mpo_megatron.data.readers import read_groups

def check(path):
    try:
        groups = list(read_groups(path))
    except ValueError:
        return
    if any(response.score < 0 for group in groups for response in group.responses[:1]):
        raise KeyError("planted")

main(sys.argv[1:], check)
"""


def fuzz(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # libFuzzer stops at 2 GB of peak memory, and a command's peak begins with that of the process that starts it: here
    # the tests', whose earlier models may have taken more. So a shell stands between.
    return subprocess.run(
        ["bash", "-c", '"$@"; exit $?', "bash", sys.executable, *arguments, "-seed=1"],
        cwd=folder, text=True, capture_output=True, timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_many_inputs(tmp_path: Path) -> None:
    done = fuzz(tmp_path, str(Path(__file__).with_name("fuzz_reader.py")), f"-runs={RUNS * MULTIPLE}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (tried,) = re.findall(r"Done (\d+) runs", done.stderr)
    print(f"\nfuzzed: {int(tried):,} files, led by coverage")
    assert int(tried) >= RUNS * MULTIPLE
    assert not list(tmp_path.glob("crash-*"))


def test_what_is_planted_is_found(tmp_path: Path) -> None:
    """A fault that none of the inputs has that it begins with: a first response with a score below 0."""
    done = fuzz(tmp_path, "-c", PLANTED, "-runs=30000")
    assert done.returncode != 0
    assert "KeyError: 'planted'" in done.stdout + done.stderr
    (found,) = tmp_path.glob("crash-*")
    again = fuzz(tmp_path, "-c", PLANTED, str(found))
    assert "KeyError: 'planted'" in again.stdout + again.stderr
