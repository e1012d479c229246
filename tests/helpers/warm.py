"""A `python` and a `torchrun` that start in a moment: forked of a process that has imported everything.

Each start of the main job imports for ten seconds before it does anything, and the tests start it a few hundred times.
`warm_python` makes a folder with two commands for the head of PATH. They run a program, or torchrun's agent and its
ranks, as a fork that stands where a fresh interpreter stands after its imports: with the arguments, environment,
working directory and streams of the command, and a session of its own. Whatever else they are asked for is left to the
real Python. The command lives as long as its fork: it passes signals on, and ends with the same status; if it is killed
itself, so is the fork.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.agents import ENVIRONMENT, ROOT

_PR_SET_CHILD_SUBREAPER = 36
_PROGRAM = ROOT / "examples" / "mpo_gpt.py"
_TORCHRUN = "torch.distributed.run"

# -I and -S: it starts in 20 ms. What has mounts of its own would not have them in a fork of a process that has not.
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

arguments = [argument for argument in sys.argv[1:] if argument != "-u"]
if os.path.basename(sys.argv[0]) == "torchrun":
    arguments = ["-m", "{torchrun}", *arguments]
known = arguments[:2] == ["-m", "{torchrun}"] or (arguments and arguments[0].endswith(".py"))
if not known or os.readlink("/proc/self/ns/mnt") != "{mounts}":
    os.environ.pop("PYTHON_EXEC", None)
    os.execv("{python}", ["{python}", *arguments])
connection = socket.socket(socket.AF_UNIX)
connection.connect("{address}")
socket.send_fds(connection, [b"+"], [0, 1, 2])
request = dict(arguments=arguments, environment=dict(os.environ, PYTHON_EXEC="{client}"), folder=os.getcwd())
connection.sendall(json.dumps(request).encode() + b"\\n")
answers = connection.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@dataclass
class Fork:
    """A program that runs as a fork."""

    pid: int
    _connection: socket.socket
    _status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self._status is None:
            with contextlib.suppress(BlockingIOError):
                self._status = int(self._connection.recv(64, socket.MSG_DONTWAIT))
                self._connection.close()
        return self._status


class WarmPython:
    """The process that programs are forked of. It adopts what they leave behind, so that it can be found.

    Attributes:
        python: the command.
        environment: for commands that are to start in a moment.
    """

    def __init__(self, folder: Path) -> None:
        self._address = folder / "socket"
        self.python = client = folder / "bin" / "python"
        client.parent.mkdir()
        client.write_text(
            _CLIENT.format(
                python=sys.executable, client=client, address=self._address, torchrun=_TORCHRUN,
                mounts=os.readlink("/proc/self/ns/mnt"),
            )
        )  # fmt: skip
        client.chmod(0o755)
        client.with_name("torchrun").symlink_to(client)
        self.environment = {
            **ENVIRONMENT,
            "PATH": f"{client.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.helpers.warm import _serve; _serve()", str(self._address)],
            env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder,
        )  # fmt: skip
        assert self._process.stdout
        assert self._process.stdout.read(1), "the process to fork of has not started"

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: Path, before: str = ""
    ) -> Fork:
        """Start a program, without a command that stands for it.

        Args:
            arguments: the program and its arguments.
            environment: beside this process's and `ENVIRONMENT`.
            output: the file that its two streams go to.
            before: "module:function" that is called before the program begins.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._address))
        with open(os.devnull) as nothing, output.open("ab") as log:
            socket.send_fds(connection, [b"+"], [nothing.fileno(), log.fileno(), log.fileno()])
        request = {
            "arguments": list(arguments),
            "environment": {**os.environ, **ENVIRONMENT, **environment},
            "folder": str(output.parent),
            "before": before,
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Fork(int(_read_line(connection)), connection)

    def left(self) -> list[psutil.Process]:
        """What runs of all that was started, and of what that has started."""
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
        self._process.communicate(timeout=20)


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[WarmPython]:
    """A `WarmPython` for a block, which needs an empty folder with a short path."""
    made = WarmPython(folder)
    try:
        yield made
    finally:
        made.close()


def _read_line(connection: socket.socket) -> bytes:
    """Up to the end of a line and no further, so that later lines stay where `recv` finds them."""
    found = b""
    while not found.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the process to fork of has ended")
        found += byte
    return found


# What follows runs in the process that is forked, and in its forks.


@dataclass
class _Server:
    listener: socket.socket
    wake: tuple[socket.socket, socket.socket] = field(default_factory=socket.socketpair)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    connections: dict[int, socket.socket] = field(default_factory=dict)  # by the fork's process number

    def serve(self) -> dict[str, Any] | None:
        """Fork until the tests have ended. Returns in each fork with what was asked for, and at the end with None."""
        for end in self.wake:
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake[1].fileno())
        for source in (self.listener, self.wake[0], sys.stdin):
            self.selector.register(source, selectors.EVENT_READ)
        os.write(1, b"+")
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is self.listener:
                    if (request := self.fork()) is not None:
                        return request
                elif key.fileobj is self.wake[0]:
                    self.wake[0].recv(4096)
                    self.reap()
                elif (
                    key.data in self.connections
                ):  # the command was killed, and says nothing in any other case
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)
                    self.forget(key.data)

    def fork(self) -> dict[str, Any] | None:
        connection, _ = self.listener.accept()
        with connection.dup() as reading:
            streams, line = _received(reading)
        # What asks may be killed at any moment.
        if not line.endswith(b"\n"):
            _close(streams)
            connection.close()
            return None
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.selector.close()
            for mine in (connection, self.listener, *self.wake, *self.connections.values()):
                mine.close()
            for stream, descriptor in enumerate(streams):
                os.dup2(descriptor, stream)
            _close(streams)
            request: dict[str, Any] = json.loads(line)
            return request
        _close(streams)
        try:
            connection.sendall(b"%d\n" % pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            connection.close()
            return None
        self.connections[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ, pid)
        return None

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended[0], os.waitstatus_to_exitcode(ended[1])
                if pid in self.connections:
                    with contextlib.suppress(OSError):
                        self.connections[pid].sendall(b"%d\n" % status)
                    self.forget(pid)

    def forget(self, pid: int) -> None:
        connection = self.connections.pop(pid)
        self.selector.unregister(connection)
        connection.close()


def _received(connection: socket.socket) -> tuple[list[int], bytes]:
    """The streams and the line that a command asks with; not the whole of it if the command has ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with contextlib.suppress(ConnectionError), connection.makefile("rb") as lines:
        return streams, lines.readline()
    return streams, b""


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _serve() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(64)
    _import_all()
    request = _Server(listener).serve()
    if request is not None:
        _become(**request)


def _import_all() -> None:
    """What the programs import at their start and later."""
    arguments, sys.argv = sys.argv, [str(_PROGRAM)]
    runpy.run_path(str(_PROGRAM), run_name="imported")
    sys.argv = arguments
    for name in (
        "datasets",
        "lightning.pytorch",
        "matplotlib.pyplot",
        "nemo.utils.exp_manager",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.configuration_llama",
        _TORCHRUN,
    ):
        importlib.import_module(name)
    # What a fork's collector wrote into objects of here, the fork would have to copy.
    gc.freeze()


def _become(arguments: list[str], environment: dict[str, str], folder: str, before: str = "") -> None:
    """Run a program as a fresh process would."""
    import numpy as np
    import torch

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # What it starts itself starts in a moment, too.
    sys.executable = environment.get("PYTHON_EXEC", sys.executable)
    sys.path[:0] = [
        path for path in environment.get("PYTHONPATH", "").split(":") if path not in ("", *sys.path)
    ]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    # Each fresh process draws its own.
    random.seed()
    np.random.seed()
    if before:
        module, _, name = before.partition(":")
        getattr(importlib.import_module(module), name)()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
