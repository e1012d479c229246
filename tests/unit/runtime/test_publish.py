"""Folders that are published: what a killed process has left goes, what another one still writes stays."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpo_megatron.errors import CheckpointError
from mpo_megatron.runtime.publish import check_writable, published

# Says that it is inside, and stays there until its input ends.
WRITER = """
import sys
from pathlib import Path
from mpo_megatron.errors import CheckpointError
from mpo_megatron.runtime.publish import check_writable, published
with published(Path(sys.argv[1])) as folder:
    (folder / "part").write_text("a part")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process that writes `tmp_path / "final"`, and the name of the folder that it writes into."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "final")]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_process_has_left_goes(
    writer: tuple["subprocess.Popen[str]", str], tmp_path: Path
) -> None:
    process, name = writer
    process.kill()
    process.wait()
    assert names(tmp_path) == {name}
    # Killed between making the folder and locking it.
    (tmp_path / ".final-empty").mkdir()
    (tmp_path / ".other-0").mkdir()
    with published(tmp_path / "final") as folder:
        assert names(tmp_path) == {folder.name, ".other-0"}
    assert names(tmp_path) == {"final", ".other-0"}


def test_what_another_process_writes_stays(
    writer: tuple["subprocess.Popen[str]", str], tmp_path: Path
) -> None:
    process, name = writer
    with published(tmp_path / "final") as folder:
        (folder / "whole").touch()
        assert names(tmp_path) == {name, folder.name}
    assert names(tmp_path / "final") == {"whole"}
    process.communicate()
    assert process.returncode == 0
    assert names(tmp_path) == {"final"}
    assert names(tmp_path / "final") == {"part"}


def test_what_cannot_be_made_is_said_before_it_is_needed(tmp_path: Path) -> None:
    final = tmp_path / "a" / "b" / "model"
    check_writable(final)
    assert list(final.parent.iterdir()) == []
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file" / "model", Path("/proc/nope/model")):
        with pytest.raises(CheckpointError, match=f"{wrong} cannot be written \\("):
            check_writable(wrong)
