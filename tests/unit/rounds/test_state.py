"""Stages of small programs: what is kept, what goes on, what is refused; processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mpo_megatron.errors import UserError
from mpo_megatron.rounds import execute, state
from mpo_megatron.rounds.stages import Command, Stage
from mpo_megatron.runtime.commands import ROOT

# Writes its second argument to its first one.
PROGRAM = """
import pathlib, sys, time
output, text = pathlib.Path(sys.argv[1]), sys.argv[2]
if text == "bad":
    sys.exit("program.py: the text is bad")
with (output.parent / "runs").open("a") as file:
    file.write(output.name + "\\n")
if text == "slow" and not (output.parent / "quick").exists():
    time.sleep(600)
if text != "nothing":
    output.write_text(text)
"""


def stage(folder: Path, name: str, *texts: str, needs: tuple[Stage, ...] = (), **settings: str) -> Stage:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    commands = tuple(
        Command(program, (str(folder / name / f"out-{i}"), text), folder / name / f"out-{i}")
        for i, text in enumerate(texts)
    )
    return Stage(name, folder / name, commands, {"texts": " ".join(texts), **settings}, needs)


def run(one: Stage) -> bool:
    return execute.execute(one, keep_checkpoints=True, say=lambda what: None)


def runs(one: Stage) -> list[str]:
    return (one.folder / "runs").read_text().split()


def test_a_stage_that_is_done_is_kept(tmp_path: Path) -> None:
    first = stage(tmp_path, "first", "a", "b")
    assert run(first)
    assert not run(first)
    assert runs(first) == ["out-0", "out-1"]
    record = state.read(first)
    assert record is not None
    assert (record.starts, record.settings) == (1, {"texts": "a b"})
    assert len(record.made or "") == 16


def test_a_command_that_has_made_its_output_is_not_started_again(tmp_path: Path) -> None:
    failing = stage(tmp_path, "first", "a", "nothing", "c")
    with pytest.raises(UserError, match=r"first has ended without .*out-1; start it again"):
        run(failing)
    (failing.folder / "out-1").write_text("b")
    assert run(failing)
    assert runs(failing) == ["out-0", "out-1", "out-2"]
    record = state.read(failing)
    assert record is not None
    assert record.starts == 2


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    bad = stage(tmp_path, "first", "a", "bad")
    with pytest.raises(UserError, match=r"^first: the text is bad \(its output: .*stage\.log\)$"):
        run(bad)
    assert not state.is_done(bad)
    # Nothing is there that it could go on from: what was left of it goes.
    assert run(stage(tmp_path, "first", "c"))
    assert not (tmp_path / "first" / "out-1").exists()
    assert (tmp_path / "first" / "out-0").read_text() == "c"


def test_other_settings_are_refused(tmp_path: Path) -> None:
    assert run(stage(tmp_path, "first", "a", seed="1"))
    for other, now in (
        (stage(tmp_path, "first", "a", seed="2"), "seed=2"),
        (stage(tmp_path, "first", "a"), "no seed"),
    ):
        with pytest.raises(
            UserError, match=f"was made with seed=1, and now it is {now}: give the same again"
        ):
            run(other)


def test_a_start_that_got_somewhere_is_not_mixed_with_other_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the text is bad"):
        run(stage(tmp_path, "first", "bad", seed="1"))
    (tmp_path / "first" / "out-0.parts").mkdir()
    with pytest.raises(UserError, match="was begun with texts=bad seed=1, and now it is texts=a seed=2"):
        run(stage(tmp_path, "first", "a", seed="2"))


def test_what_a_stage_reads_must_be_what_it_was_made_of(tmp_path: Path) -> None:
    first = stage(tmp_path, "first", "a")
    second = stage(tmp_path, "second", "b", needs=(first,))
    with pytest.raises(UserError, match="second needs first, which is not done; start that first"):
        run(second)
    assert run(first)
    assert run(second)
    # Made again with the same outcome, and with another one.
    (first.folder / state.RECORD).unlink()
    assert run(first)
    assert not run(second)
    (first.folder / state.RECORD).unlink()
    (first.folder / "out-0").write_text("other")
    assert run(first)
    with pytest.raises(UserError, match="second was made with what first made="):
        run(second)
    third = stage(tmp_path, "third", "c", needs=(first,))
    (first.folder / "out-0").unlink()
    with pytest.raises(
        UserError, match=r"out-0 is no more, and third reads it; remove .*first to make it anew"
    ):
        run(third)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "starts": 1, "more": 1}'])
def test_a_damaged_record_is_one_sentence(content: str, tmp_path: Path) -> None:
    first = stage(tmp_path, "first", "a")
    assert run(first)
    (first.folder / state.RECORD).write_text(content)
    with pytest.raises(UserError, match=r"stage\.json is damaged; remove"):
        run(first)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("")
    with pytest.raises(UserError, match=r"first cannot be written: (File exists|Not a directory)"):
        run(replace(stage(tmp_path, "other", "a"), folder=tmp_path / "first"))


def test_two_at_a_time_and_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process has the stage it is refused; that killed, its command ends, and the stage goes on."""
    slow = stage(tmp_path, "first", "a", "slow")
    other = (
        "import pathlib, sys\n"
        "from tests.unit.rounds.test_state import run, stage\n"
        f"run(stage(pathlib.Path({str(tmp_path)!r}), 'first', 'a', 'slow'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", other], env=environment)
    while not (slow.folder / "runs").is_file() or len(runs(slow)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    monkeypatch.setattr(state, "_WAIT_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"another process works on .*first; wait for it, or end it"):
        run(slow)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(state, "_WAIT_SECONDS", 30.0)
    (slow.folder / "quick").touch()
    assert run(slow)
    assert runs(slow) == ["out-0", "out-1", "out-1"]
    assert json.loads((slow.folder / state.RECORD).read_text())["starts"] == 2
