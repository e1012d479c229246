"""A run that is killed goes on where it stopped, and never with other settings."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.parts import ShardWriter, begin, digest_of_folder
from mpo_megatron.rollout.work import work_off

ROOT = Path(__file__).parents[3]
RECORDS = [{"id": f"r{number}", "text": "é" * number} for number in range(12)]
INPUTS = {record["id"]: str(number) for number, record in enumerate(RECORDS)}
SETTINGS = {"--seed": 0, "--top-p": 0.9}


def assemble(record: dict, value: object) -> dict:
    return record | {"value": value}


def lengths(batch: list[dict]) -> tuple[list[int], int]:
    return [len(record["text"]) for record in batch], len(batch)


def start_lengths(number: int):
    return lengths


def run(output: Path, records=RECORDS, settings=SETTINGS, start=start_lengths, processes=1) -> list[str]:
    """A whole run in batches of two. Returns the ids that it worked off."""
    with begin(output, settings, {record["id"]: INPUTS[record["id"]] for record in records}) as parts:
        finished = parts.finished()
        waiting = [record for record in records if record["id"] not in finished]
        batches = [waiting[first : first + 2] for first in range(0, len(waiting), 2)]
        work_off(parts, batches, start, processes=processes, total=len(records), unit="record")
        parts.merge(output, records, assemble)
    return [record["id"] for record in waiting]


def test_a_folder_as_output_is_said_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} is a folder; give the name of a file"):
        run(tmp_path, start=stop_after(0))
    assert list(tmp_path.parent.glob(f"{tmp_path.name}*")) == [tmp_path]


def stop_after(batches: int):
    """A `StartWorker` whose worker fails when so many batches are done."""
    left = iter(range(batches))

    def worker(batch):
        if next(left, None) is None:
            raise UserError("stopped")
        return lengths(batch)

    return lambda number: worker


def begun(output: Path, batches: int = 2) -> Path:
    """The folder of a run that stopped after so many batches."""
    with pytest.raises(UserError, match="stopped"):
        run(output, start=stop_after(batches))
    assert not output.exists()
    return output.with_name(output.name + ".parts")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


EXPECTED = [assemble(record, number) for number, record in enumerate(RECORDS)]


def test_the_output_is_in_the_order_of_the_input_and_nothing_else_is_left(tmp_path):
    output = tmp_path / "new" / "out.jsonl"
    assert len(run(output, processes=1)) == 12
    assert read(output) == EXPECTED
    assert os.listdir(output.parent) == ["out.jsonl"]
    # Whole runs are not gone on with: the same again is made anew.
    assert len(run(output)) == 12


def test_it_goes_on_where_it_stopped(tmp_path):
    output = tmp_path / "out.jsonl"
    begun(output, batches=3)
    assert run(output) == [f"r{number}" for number in range(6, 12)]
    assert read(output) == EXPECTED


@pytest.mark.parametrize("cut", [1, 2, 9, 20])
def test_half_a_line_at_the_end_is_dropped(tmp_path, cut):
    output = tmp_path / "out.jsonl"
    shard = begun(output) / "00000.jsonl"
    content = shard.read_bytes()
    last = content.rfind(b"\n", 0, -1) + 1
    shard.write_bytes(content[: min(last + cut, len(content) - 1)])
    assert run(output)[0] == "r3"
    assert read(output) == EXPECTED


def test_a_shard_of_half_a_line_and_nothing_else(tmp_path):
    output = tmp_path / "out.jsonl"
    (begun(output) / "00000.jsonl").write_bytes(b'{"id": "r0"')
    assert len(run(output)) == 12
    assert read(output) == EXPECTED


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"value": 3}\n', b"\xff\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    output = tmp_path / "out.jsonl"
    shard = begun(output) / "00000.jsonl"
    shard.write_bytes(line + shard.read_bytes())
    with pytest.raises(UserError, match=r"00000\.jsonl:1 is damaged; delete .*parts to begin anew"):
        run(output)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"settings": {**SETTINGS, "--top-p": 1.0}}, "--top-p was 0.9 and not 1.0"),
        ({"settings": {"--seed": 0}}, "--top-p was 0.9 and not None"),
        ({"settings": {**SETTINGS, "--new": "x"}}, "--new was None and not 'x'"),
        ({"records": RECORDS[:-1]}, "there was a record 'r11' more"),
        ({"records": RECORDS[::-1]}, "the records were in another order"),
    ],
)
def test_other_settings_and_inputs_are_refused(tmp_path, changes, difference):
    output = tmp_path / "out.jsonl"
    begun(output)
    with pytest.raises(UserError) as error:
        run(output, **changes)
    assert difference in str(error.value)
    assert "delete the folder to begin anew" in str(error.value)
    run(output)
    assert read(output) == EXPECTED


def test_changed_and_new_records_are_refused(tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    begun(output)
    monkeypatch.setitem(INPUTS, "r5", "edited")
    with pytest.raises(UserError, match="the record 'r5' was another"):
        run(output)
    monkeypatch.setitem(INPUTS, "r5", "5")
    monkeypatch.setitem(INPUTS, "x", "0")
    with pytest.raises(UserError, match="there was no record 'x'"):
        run(output, records=[*RECORDS, {"id": "x", "text": ""}])


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="stopped"):
        run(output, start=stop_after(0))
    assert os.listdir(tmp_path) == []
    # Nor does what it had when it was killed bind the next.
    folder = begun(output)
    (folder / "00000.jsonl").write_bytes(b'{"id": "r0", "val')
    assert len(run(output, settings={})) == 12


def test_a_damaged_manifest_and_one_that_is_missing(tmp_path):
    output = tmp_path / "out.jsonl"
    manifest = begun(output) / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        run(output)
    # Shards without a manifest are the rest of a folder that was being removed.
    manifest.unlink()
    assert len(run(output, settings={})) == 12


def test_two_runs_at_once_are_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    with (
        begin(output, SETTINGS, INPUTS),
        pytest.raises(UserError, match=r"another run writes to .*out\.jsonl\.parts"),
    ):
        run(output)
    run(output)


def test_a_record_that_is_missing_at_the_end_is_named(tmp_path):
    output = tmp_path / "out.jsonl"
    with begin(output, SETTINGS, INPUTS) as parts, pytest.raises(UserError, match="'r0' is not in"):
        parts.merge(output, RECORDS, assemble)
    assert not output.exists()


def test_each_writer_has_a_shard_of_its_own(tmp_path):
    writers = [ShardWriter(tmp_path) for _ in range(3)]
    assert [writer.number for writer in writers] == [0, 1, 2]
    writers[1].close()
    again = ShardWriter(tmp_path)
    assert again.number == 1
    for writer in (writers[0], writers[2], again):
        writer.close()


def test_a_folders_digest_sees_what_training_changes(tmp_path):
    file = tmp_path / "a" / "model.safetensors"
    file.parent.mkdir()
    weights = bytearray(random.Random(0).randbytes(5_000_000))
    file.write_bytes(weights)
    first = digest_of_folder(tmp_path)
    os.utime(file, (0, 0))
    assert digest_of_folder(tmp_path) == first
    for place in (0, 4_999_999):
        changed = bytearray(weights)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert digest_of_folder(tmp_path) != first
    file.write_bytes(weights)
    (tmp_path / "config.json").write_text("{}")
    assert digest_of_folder(tmp_path) != first


# A worker that takes 20 ms for a record, and notes in a log what it takes up.
PROGRAM = """
import os, sys, time
from pathlib import Path
from mpo_megatron.rollout.parts import begin
from mpo_megatron.rollout.work import work_off

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
records = [{"id": f"r{number}"} for number in range(60)]

def start(number):
    def worker(batch):
        for record in batch:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(log, f"{record['id']} {os.getpid()}\\n".encode())
            os.close(log)
            time.sleep(0.02)
        return [record["id"] * 3 for record in batch], len(batch)
    return worker

if __name__ == "__mp_main__" and os.environ.get("MPO_TEST_ORPHANS"):
    # A process of the pool that is only ready when the one that started it has been killed.
    parent = os.getppid()
    (folder / f"starting-{os.getpid()}").touch()
    while os.getppid() == parent:
        time.sleep(0.005)

if __name__ == "__main__":
    output = folder / "out.jsonl"
    with begin(output, {}, {record["id"]: "" for record in records}) as parts:
        finished = parts.finished()
        waiting = [record for record in records if record["id"] not in finished]
        batches = [waiting[first : first + 2] for first in range(0, len(waiting), 2)]
        work_off(parts, batches, start, processes=processes, total=60, unit="record")
        parts.merge(output, records, lambda record, value: record | {"value": value})
"""


def log(folder: Path) -> list[list[str]]:
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def kept(folder: Path) -> set[str]:
    """Ids that have a whole line."""
    return {
        json.loads(line)["id"]
        for shard in (folder / "out.jsonl.parts").glob("0*.jsonl")
        for line in shard.read_bytes().split(b"\n")[:-1]
    }


def running(folder: Path) -> list[str]:
    """Processes that were started for `folder` and have not ended, by their environment."""
    mark, found = f"MPO_TEST_FOLDER={folder}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        # A process that ends meanwhile has no files, and one that has ended has no environment.
        with contextlib.suppress(OSError):
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(place.name)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def wait_for_lines(folder: Path, lines: int) -> None:
    wait_until(lambda: len(log(folder)) >= lines)


def start_program(folder: Path, processes: int, **environment: str) -> "subprocess.Popen[bytes]":
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), str(folder), str(processes)], stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPO_TEST_FOLDER": str(folder), **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_it_repeats_nothing_that_was_finished(tmp_path, processes):
    moments = random.Random(processes)
    for _ in range(3):
        finished, begun_before = kept(tmp_path), len(log(tmp_path))
        process = start_program(tmp_path, processes)
        wait_for_lines(tmp_path, begun_before + moments.randint(3, 14))
        assert process.poll() is None
        time.sleep(moments.random() * 0.03)
        process.kill()
        process.communicate()
        # Processes of a pool end with the one that started them.
        wait_until(lambda: not running(tmp_path), seconds=30)
        assert not finished & {name for name, _ in log(tmp_path)[begun_before:]}
    finished, begun_before = kept(tmp_path), len(log(tmp_path))
    assert 6 <= len(finished) < 60
    assert start_program(tmp_path, processes).wait(timeout=120) == 0
    taken = log(tmp_path)[begun_before:]
    assert {name for name, _ in taken} == {f"r{number}" for number in range(60)} - finished
    assert len({pid for _, pid in taken}) <= processes
    assert read(tmp_path / "out.jsonl") == [
        {"id": f"r{number}", "value": f"r{number}" * 3} for number in range(60)
    ]
    assert sorted(os.listdir(tmp_path)) == ["log", "out.jsonl", "program.py"]


@pytest.mark.slow
def test_killed_while_its_processes_start_none_of_them_begins(tmp_path):
    process = start_program(tmp_path, 4, MPO_TEST_ORPHANS="1")
    wait_until(lambda: len(list(tmp_path.glob("starting-*"))) == 4)
    process.kill()
    process.communicate()
    wait_until(lambda: not running(tmp_path), seconds=30)
    assert log(tmp_path) == []
