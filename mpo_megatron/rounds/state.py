"""What of the stages is done, on disk: `stage.json` in each stage's folder.

It is written when a stage begins, and again with a digest of what the stage has made when it is done. A stage is done
with these settings and with what other stages had made then; under other ones it is refused, never reused.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mpo_megatron.errors import UserError
from mpo_megatron.overrides import what_differs
from mpo_megatron.rollout.parts import digest_of_folder
from mpo_megatron.rounds.stages import Stage

RECORD = "stage.json"
# A stage of a start that was killed ends within so many seconds: torchrun gives its ranks 30.
_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Record:
    """What is known of a stage.

    Attributes:
        settings: the stage's, and the digest of each stage's outputs that it reads.
        starts: how often it was begun.
        made: digest of its outputs; None while it is not done.
        seconds: that its last start took.
        ended: Unix time.
    """

    settings: dict[str, str]
    starts: int
    made: str | None = None
    seconds: float = 0.0
    ended: float = 0.0


def read(stage: Stage) -> Record | None:
    """The record of a stage that was begun.

    Raises:
        UserError: the file is none of the rounds'.
    """
    path = stage.folder / RECORD
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove {stage.folder} to make it anew") from error


def settings_now(stage: Stage) -> dict[str, str]:
    """What the stage's outputs would depend on if it was begun now.

    Raises:
        UserError: a stage that it needs is not done.
    """
    found = dict(stage.settings)
    for need in stage.needs:
        record = read(need)
        if record is None or record.made is None:
            raise UserError(f"{stage} needs {need}, which is not done; start that first")
        found[f"what {need} made"] = record.made
    return found


def is_done(stage: Stage) -> bool:
    """Whether a stage is done.

    Raises:
        UserError: it is, or a start of it got somewhere, under other settings.
    """
    record = read(stage)
    if record is None:
        return False
    now = settings_now(stage)
    if record.settings == now:
        return record.made is not None
    if record.made is None and not any(any(stage.folder.glob(pattern)) for pattern in stage.resumes):
        return False
    then, wanted = what_differs(record.settings, now)
    raise UserError(
        f"{stage.folder} was {'made' if record.made else 'begun'} with {then}, and now it is {wanted}: give the same "
        "again, remove that folder to make it anew, or give another --output"
    )


def begin(stage: Stage) -> None:
    """Record that a stage begins. What a start under other settings has left is removed.

    Raises:
        UserError: what the stage reads is no more, or the folder cannot be written.
    """
    before, now = read(stage), settings_now(stage)
    for need in stage.needs:
        for output in need.outputs:
            if not output.exists():
                raise UserError(
                    f"{output} is no more, and {stage} reads it; remove {need.folder} to make it anew"
                )
    try:
        if before is not None and before.settings != now:
            for path in stage.folder.iterdir():
                if path.name not in (RECORD, "lock"):
                    _remove(path)
        _write(stage, Record(now, before.starts + 1 if before else 1))
    except OSError as error:
        raise UserError(f"{stage.folder} cannot be written: {error.strerror or error}") from error


def finish(stage: Stage, seconds: float) -> Record:
    """Record that a stage is done.

    Raises:
        UserError: it has not made what it should.
    """
    begun = read(stage)
    assert begun is not None
    for output in stage.outputs:
        if not output.exists():
            raise UserError(f"{stage} has ended without {output}; start it again")
    record = Record(begun.settings, begun.starts, _digest(stage.outputs), round(seconds, 1), time.time())
    _write(stage, record)
    return record


def _digest(outputs: list[Path]) -> str:
    found = hashlib.sha256()
    for path in outputs:
        if path.is_dir():
            found.update(digest_of_folder(path).encode())
        else:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def _write(stage: Stage, record: Record) -> None:
    """Write the record, whole or not at all."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    temporary = stage.folder / f"{RECORD}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(stage.folder / RECORD)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def held(stage: Stage) -> Iterator[int]:
    """A block in which no other process works on the stage; gives the open lock file, for the stage's commands to hold.

    As long as one of these lives, the stage is not free: one that outlives its start by a moment is waited for.

    Raises:
        UserError: another process has it.
    """
    try:
        stage.folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(stage.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{stage.folder} cannot be written: {error.strerror or error}") from error
    try:
        _lock(opened, stage)
        yield opened
    finally:
        os.close(opened)


def _lock(opened: int, stage: Stage) -> None:
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(f"another process works on {stage.folder}; wait for it, or end it") from None
            time.sleep(0.2)
        except OSError:
            # A file system without locks has nobody ask.
            return
