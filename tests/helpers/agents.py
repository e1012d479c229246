"""The main job under real torchrun agents, each as a node of its own would have one, on this machine."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


@dataclass(frozen=True)
class Ended:
    """How a process has ended, and what it and its ranks have printed."""

    status: int
    output: str

    @property
    def errors(self) -> list[str]:
        """The sentences of the job's errors."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def free_port() -> int:
    """A port that nothing listens on now, and that no connection of another process takes before it is listened on:
    those are from 32768 up (net.ipv4.ip_local_port_range).
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port


def torchrun(nodes: int, node: int, ranks: int, port: int, *, c10d: bool = False) -> list[str]:
    """The start of the command of one node's agent, up to the program.

    Args:
        ranks: of this node.
        port: of the first node, for all.
        c10d: agents find each other and number themselves; else `node` is this one's number.
    """
    command = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(ranks)]
    if c10d:
        return [
            *command,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-id",
            "test",
        ]
    return [*command, "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]


def run_all(
    commands: Sequence[Sequence[str]],
    timeout: float,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Run commands side by side in `folder` to their ends.

    Args:
        environment: beside this process's and `ENVIRONMENT`.

    Raises:
        AssertionError: one has not ended in `timeout` seconds.
    """
    found = {**os.environ, **ENVIRONMENT, **(environment or {})}
    logs = [folder / f"process-{number}.log" for number in range(len(commands))]
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as stream:
            processes.append(
                subprocess.Popen(
                    command, stdout=stream, stderr=subprocess.STDOUT, cwd=folder,
                    env=found, start_new_session=True,
                )
            )  # fmt: skip
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        told = "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in logs)
        raise AssertionError(f"not ended after {timeout:g} s\n{told}") from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the agent ends its ranks
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    return [Ended(p.returncode, log.read_text()) for p, log in zip(processes, logs, strict=True)]


def job(*overrides: str) -> list[str]:
    """The main job's program and arguments."""
    return [str(ROOT / "examples" / "mpo_gpt.py"), *overrides]
