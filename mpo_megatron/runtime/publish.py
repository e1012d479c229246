"""Folders that appear under their name when they are complete, or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mpo_megatron.errors import CheckpointError


@contextlib.contextmanager
def published(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to write into; it takes that name, in an older folder's place, when the block ends.

    After an error it is removed, and an older folder is as it was. What a process that was killed has left of the same
    kind is removed, too.

    Raises:
        CheckpointError: the file system refuses to write (an OSError inside the block).
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        with _own_folder(final) as temporary:
            yield temporary
            replace(temporary, final)
    except OSError as error:
        raise cannot_write(final, error) from error


@contextlib.contextmanager
def _own_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final`, locked as long as the block lasts, or the process."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        opened = os.open(temporary, os.O_RDONLY)
        # A file system without locks has nobody ask.
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for abandoned.
        if temporary.exists():
            break
        os.close(opened)
    try:
        temporary.chmod(0o755)  # mkdtemp's is for its maker alone
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(opened)


def _remove_abandoned(final: Path) -> None:
    """Remove the folders of `_own_folder` whose process is no more."""
    for path in final.parent.glob(f".{final.name}-*"):
        # Another process has it, or has just removed it, or nobody can tell.
        with contextlib.suppress(OSError):
            opened = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(opened)


def replace(temporary: Path, final: Path) -> None:
    """Rename a complete folder, in the place of an older one; the storage keeps the names when this returns."""
    older = temporary.with_name(temporary.name + "-replaced")
    _sync(temporary)
    if final.exists():
        final.rename(older)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Of storage that syncs files alone.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Hold a shared lock on a file of a folder while the folder is read, so that nobody removes it."""
    with file.open("rb") as opened:
        # A file system without locks has nobody ask.
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_SH)
        yield


def is_being_read(file: Path) -> bool:
    """Whether a process holds the lock of `reading`."""
    with file.open("rb+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def cannot_write(final: Path, error: OSError) -> CheckpointError:
    """What to say when the file system refuses."""
    return CheckpointError(
        f"{final} cannot be written ({error.strerror or error}); nothing was left there: make room or give another "
        "folder, then run it again"
    )


def check_writable(final: Path) -> None:
    """Check that a folder can be made, long before it is: what is above it is made, and written to.

    Raises:
        CheckpointError: the file system refuses.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=final.parent):
            pass
    except OSError as error:
        raise cannot_write(final, error) from error


def check_space(final: Path, needed_bytes: int) -> None:
    """Check before anything is written that the folder will fit.

    Raises:
        CheckpointError: less than `needed_bytes` are free where `final` will be.
    """
    there = final.absolute().parent
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{final} needs {needed_bytes / 1e9:.3g} GB and {there} has {free / 1e9:.3g} GB free; "
            "make room or give a folder on another file system"
        )
