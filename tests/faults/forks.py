"""Ranks of the main job that start in a moment and are killed for real, without torchrun.

A rank leads a session of its own, as torchrun has it, and runs examples/mpo_gpt.py from the first line to the end of
the interpreter. What is spared is the ten seconds of imports, so that a test can afford to kill hundreds.
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.agents import free_port, job
from tests.helpers.warm import Fork, WarmPython


@dataclass
class Job:
    """The ranks of one start of the job.

    Attributes:
        ends: by rank, the exit status of those that have ended; negative for a signal.
    """

    ranks: list[Fork]
    logs: list[Path]
    ends: dict[int, int] = field(default_factory=dict)

    def poll(self) -> dict[int, int]:
        """The ranks that have ended, with their status."""
        for number, rank in enumerate(self.ranks):
            if number not in self.ends and (status := rank.poll()) is not None:
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
        return self.logs[number].read_text(errors="replace")


class Forks:
    """What starts the job's ranks, with their output in a folder."""

    def __init__(self, folder: Path, python: WarmPython) -> None:
        self._folder, self._python, self._started = folder, python, 0
        self.left = python.left

    def start(self, world: int, arguments: Sequence[str], before: str = "") -> Job:
        """Start the job on `world` ranks.

        Args:
            before: "module:function" that each rank calls before the program begins.
        """
        self._started += 1
        everywhere = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        logs = [self._folder / f"start{self._started}-rank{rank}.log" for rank in range(world)]
        ranks = [
            self._python.start(
                job(*arguments), {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log, before
            )
            for rank, log in enumerate(logs)
        ]
        return Job(ranks, logs)
