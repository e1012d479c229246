"""The digests of a checkpoint's small files: whether each is as it was written, to be found out before it is loaded.

Tensors have checksums of their own (`CheckpointReader.check`). All other files (index, configuration, tokenizer) have a
SHA-256 in a file beside them, which `sha256sum -c` reads, too. A checkpoint of another program has none.
"""

import hashlib
import os
from pathlib import Path

from mpo_megatron.errors import CheckpointError

DIGESTS_FILE = "SHA256SUMS"
_TENSOR_FILES = ".distcp"


def write_digests(folder: Path) -> None:
    """Write down the digests of all small files below a folder, and have the storage keep these: before it is named."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != _TENSOR_FILES:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            lines.append(f"{digest}  {path.relative_to(folder)}\n")
    with (folder / DIGESTS_FILE).open("w", encoding="utf-8") as written:
        written.writelines(lines)
        written.flush()
        os.fsync(written.fileno())


def check_digests(folder: Path) -> None:
    """Check the files that `write_digests` has seen.

    Raises:
        CheckpointError: one is missing, or not as it was written.
    """
    try:
        lines = (folder / DIGESTS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / DIGESTS_FILE} cannot be read ({error})") from error
    for line in lines:
        digest, _, name = line.partition("  ")
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name} cannot be read ({error})") from error
        if found != digest:
            raise CheckpointError(f"{folder / name} is not as it was written")
