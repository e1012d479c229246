"""Sub-processes of a comparison: run to their end, ended with this process, their error in a sentence."""

import os
import re
import subprocess
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
# What torchrun is given to end its ranks; it kills them after 30 seconds.
_END_SECONDS = 45.0
# How the main job and the tools begin the sentence of a user's error; argparse adds "error: " of its own.
_SENTENCE = re.compile(r"^(?:error|\w+\.py): (?:error: )?(?=\S)")


def run_to_end(command: list[str], log: IO[bytes], ranks: int) -> int:
    """Run a command with this package's code, its output in a file. Returns its status; an interrupt ends it."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A session of its own: an interrupt from the keyboard comes here alone, and torchrun is told once, below.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        finally:
            process.kill()
        raise


def what_failed(printed: str, status: int) -> str:
    """The sentence that a command printed as its error; of one that broke, the last error of its tracebacks."""
    lines = [line.rpartition("\r")[2].strip() for line in printed.splitlines()]
    sentences = [_SENTENCE.sub("", line) for line in lines if _SENTENCE.match(line)]
    if sentences:
        return sentences[-1]
    # torchrun's own error says that a process has failed, and no more.
    errors = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines if "ChildFailedError" not in line]
    errors = [line for line in errors if re.match(r"[\w.]*(Error|Exception|Interrupt)(:|$)", line)]
    return errors[-1] if errors else f"the job ended with status {status} and no error message"
