"""Ranks of the main job that start in a moment: forked of a process that has imported everything, killed for real.

A rank begins where a fresh process stands after its imports: it leads a session of its own, as torchrun has it, has its
own environment, arguments and output, and runs examples/mpo_gpt.py as `__main__` from the first line to the end of the
interpreter. What is spared is the eleven seconds of imports, so that a test can afford to kill hundreds.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.agents import ENVIRONMENT, ROOT, free_port

PROGRAM = ROOT / "examples" / "mpo_gpt.py"
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Rank:
    """A forked rank."""

    pid: int
    log: Path


@dataclass
class Job:
    """The ranks of one start of the job."""

    forks: "Forks"
    ranks: list[Rank]
    ends: dict[int, int] = field(default_factory=dict)  # by rank: the status, negative for a signal

    def poll(self) -> dict[int, int]:
        """The ranks that have ended, with their status."""
        for number, rank in enumerate(self.ranks):
            if number not in self.ends and (status := self.forks.ask("status", rank.pid)) is not None:
                self.ends[number] = status
        return self.ends

    def kill(self, numbers: Sequence[int], how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to some ranks, and to nothing that they have started."""
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[number].pid, how)

    def wait(self, seconds: float) -> bool:
        """Whether all ranks have ended within that time."""
        end = time.monotonic() + seconds
        while len(self.poll()) < len(self.ranks):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def end(self, by_itself: float = 5.0) -> None:
        """See the job to its end after a fault: ranks that do not end get SIGTERM, as from torchrun."""
        if self.wait(by_itself):
            return
        self.kill(range(len(self.ranks)), signal.SIGTERM)
        assert self.wait(20), self.output()

    def output(self, number: int = 0) -> str:
        """What a rank has printed."""
        return self.ranks[number].log.read_text(errors="replace")


class Forks:
    """The process that ranks are forked of. It adopts what they leave behind, so that it can be found."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder, self._started = folder, 0
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.faults.forks import _serve; _serve()", str(theirs.fileno())],
            env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo", **(environment or {})},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=folder, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        self.ask("status", 0)  # which is answered when all is imported

    def ask(self, *request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()

    def start(self, world: int, arguments: Sequence[str], before: str = "") -> Job:
        """Start the job on `world` ranks.

        Args:
            before: "module:function" that each rank calls before the program begins.
        """
        self._started += 1
        port, ranks = free_port(), []
        for rank in range(world):
            log = self._folder / f"start{self._started}-rank{rank}.log"
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            ranks.append(Rank(self.ask("start", list(arguments), own, str(log), before), log))
        return Job(self, ranks)

    def left(self) -> list[psutil.Process]:
        """What runs of all that ranks have started, and they themselves."""
        alive = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def close(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._connection.close()
        self._process.wait(20)


@contextlib.contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """A `Forks` for a block."""
    made = Forks(folder)
    try:
        yield made
    finally:
        made.close()


# What follows runs in the process that is forked.


def _serve() -> None:
    connection = Connection(int(sys.argv[1]))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _import_all()
    statuses: dict[int, int] = {}
    while True:
        try:
            kind, *values = connection.recv()
        except EOFError:
            return
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                statuses[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        if kind == "status":
            connection.send(statuses.get(values[0]))
            continue
        pid = os.fork()
        if not pid:
            connection.close()
            _become_rank(*values)
            return
        connection.send(pid)


def _import_all() -> None:
    """What the job imports at its start and later."""
    arguments, sys.argv = sys.argv, [str(PROGRAM)]
    runpy.run_path(str(PROGRAM), run_name="imported")
    sys.argv = arguments
    import datasets  # noqa: F401
    import lightning.pytorch
    import matplotlib.pyplot  # noqa: F401
    import nemo.utils.exp_manager
    import transformers.models.llama.configuration_llama  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    assert lightning.pytorch.Trainer is not None
    assert nemo.utils.exp_manager.exp_manager is not None
    # What a rank's collector wrote into objects of here, the rank would have to copy.
    gc.freeze()


def _become_rank(arguments: list[str], environment: dict[str, str], log: str, before: str) -> None:
    os.setsid()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.argv = [str(PROGRAM), *arguments]
    if before:
        module, _, name = before.partition(":")
        getattr(importlib.import_module(module), name)()
    runpy.run_path(str(PROGRAM), run_name="__main__")
