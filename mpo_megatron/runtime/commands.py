"""A command as a sub-process: its output in a file, ended with this process, its error in a sentence."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "examples" / "mpo_gpt.py"
# What torchrun is given to end its ranks; it kills them after 30 seconds.
_END_SECONDS = 45.0
_PR_SET_PDEATHSIG = 1  # of Linux


_interrupted = False


def interrupt_on_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt from now on, but those that are ignored, as under nohup.

    Of one that comes while a command is forked Python prints what its handler raises, and goes on: `run_to_end` then
    raises it.
    """

    def interrupt(number: int, frame: Any) -> None:
        global _interrupted
        _interrupted = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def torchrun(ranks: int) -> list[str]:
    """The beginning of a command that runs a program in so many ranks on this machine.

    They meet at the loopback address: by default at the machine's own name, which a container may not know, and then
    wait for it without end.
    """
    here = ["--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *here, "--nproc-per-node", str(ranks)]


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options of a YAML as a command line, {top_p: 0.9} or {top-p: 0.9} as --top-p 0.9.

    A true one stands alone, null and false ones are left out, a list is several values, and a mapping JSON.
    """
    found: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        found.append(f"--{str(name).replace('_', '-')}")
        if isinstance(value, list):
            found += map(str, value)
        elif value is not True:
            found.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return found


def run_to_end(
    command: Sequence[str],
    log: IO[bytes],
    processes: int = 1,
    *,
    environment: Mapping[str, str] | None = None,
    keeps: Sequence[int] = (),
    passes: Sequence[signal.Signals] = (),
) -> int:
    """Run a command with this package's code, its output in a file. Returns its status.

    An interrupt ends it. So does the end of this process, however it comes (on Linux): SIGTERM goes to the command.

    Args:
        processes: that share the machine's cores.
        environment: variables beside those of this process.
        keeps: open files that the command holds open as long as it lives, such as a lock's.
        passes: signals that are passed on to it.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        **(environment or {}),
    }
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A session of its own: an interrupt from the keyboard comes here alone, and torchrun is told once, below.
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=variables,
        start_new_session=True,
        pass_fds=tuple(keeps),
        preexec_fn=_end_with(os.getpid()) if sys.platform == "linux" else None,
    )
    before = {number: signal.signal(number, lambda got, _: process.send_signal(got)) for number in passes}
    try:
        if _interrupted:
            raise KeyboardInterrupt
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        finally:
            process.kill()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with(parent: int) -> Callable[[], Any]:
    """What a fork of `parent` does before it becomes the command."""
    # Loaded here: another thread may hold a lock of the loader when the fork is made.
    prctl = ctypes.CDLL(None).prctl

    def end_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        # It has ended before the kernel was told.
        if os.getppid() != parent:
            os._exit(1)

    return end_with_parent


def what_failed(printed: str, status: int) -> str:
    """The sentence that a job printed as its error; of a job that broke, the last error of its tracebacks."""
    lines = [line.rpartition("\r")[2].strip() for line in printed.splitlines()]
    sentences = [
        found[1] for line in lines if (found := re.match(r"(?:error|\w+\.py): (?:error: )?(.+)", line))
    ]
    if sentences:
        return sentences[-1]
    # torchrun's own error says that a process has failed, and no more.
    errors = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines if "ChildFailedError" not in line]
    errors = [line for line in errors if re.match(r"[\w.]*(Error|Exception|Interrupt)(:|$)", line)]
    return errors[-1] if errors else f"the job ended with status {status} and no error message"
