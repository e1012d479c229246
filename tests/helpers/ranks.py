"""Test cases on real ranks (Gloo on CPUs, NCCL on GPUs): processes that start once and run one case after another.

    def case(x):                                  # module level: the ranks import it by name
        ...                                       # torch.distributed is up: RANK of WORLD_SIZE, as under torchrun
        return value                              # picklable

    def test_it(ranks):                           # the fixture of tests/distributed/conftest.py
        values = ranks(4).run(case, 1.0)          # [value of rank 0, ..., value of rank 3]

Every case gets a process group of its own, the seed 0 and the default dtype float32, so that cases do not depend on
their order. Tensors come back on the CPU. A case that fails on a rank, or does not end in time, raises RankError here
with every failed rank's traceback and the stack of every rank that was still running; the processes are then killed,
and the next case starts new ones.

This module knows torch.distributed and nothing above it. `setup` and `teardown` ("module:function") say what a rank
calls once before anything else, and after each case.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_HOST = "127.0.0.1"
_START_SECONDS = 240  # importing torch and Megatron-core in many processes at once, on few cores
_FINISH_SECONDS = 60
_GRACE_SECONDS = 2.0  # after a rank has failed, what the others have to say is worth this wait
_SHOWN_OUTPUT = 4000
# Each Gloo group has a thread that wakes up a hundred times a second. Some hundred of them, of models that autograd's
# graph keeps after an exception or Megatron's experts, made all later cases take three times as long.
_MOST_THREADS = 100


class RankError(Exception):
    """A case failed on a rank, ended it, or did not end in time. The message holds tracebacks, stacks and output."""


@dataclass(frozen=True)
class _Case:
    """What a rank needs to run a case."""

    name: str  # of this run of the case: the prefix of its keys in the store
    function: str  # "module:qualified name"
    arguments: bytes  # pickled (args, kwargs)
    world_size: int
    master_port: int  # free, for a case that starts a process group of its own


@dataclass
class _Worker:
    """One rank's process, seen from the tests."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    folder: Path
    output_start: int = field(default=0)

    @property
    def output(self) -> Path:
        return self.folder / f"rank{self.rank}.out"

    @property
    def stacks(self) -> Path:
        return self.folder / f"rank{self.rank}.stacks"

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # of a process that has ended: receive() says how
            self.connection.send_bytes(pickle.dumps(message))

    def receive(self) -> tuple[str, Any]:
        """The next message: ("result", value), ("error", traceback) or, of an ended process, ("died", how)."""
        try:
            data = self.connection.recv_bytes()
        except (EOFError, OSError):
            code = self.process.wait(timeout=_FINISH_SECONDS)
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            return "died", f"the process ended by itself ({how})\n{self.read_stacks()}"
        try:
            return pickle.loads(data)
        except Exception:
            return "error", f"the result could not be read back:\n{traceback.format_exc()}"

    def request_stack(self) -> None:
        """Have the process write the stacks of all its threads, whatever it is doing."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGUSR1)

    def read_stacks(self) -> str:
        """What faulthandler wrote: on request, or at a fatal signal."""
        threads = self.stacks.read_text().strip().split("\n\n")
        return "\n\n".join(thread for thread in threads if _die_with_the_tests.__name__ not in thread)

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # each rank leads a session and group of its own
        self.process.wait()
        self.connection.close()


class RankProcesses:
    """Rank processes, as many as the largest world that a case has asked for; smaller cases use the first ones.

    Args:
        setup: "module:function" that each rank calls once, before anything else is imported.
        teardown: "module:function" that each rank calls after each case.
        gpus: each rank has a GPU, the one of its number.
        environment: of the processes, beside this one's.
    """

    def __init__(
        self,
        setup: str | None = None,
        teardown: str | None = None,
        *,
        gpus: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._hooks = (setup or "", teardown or "")
        self._backend = "nccl" if gpus else "gloo"
        self._environment = dict(environment or {})
        self._workers: list[_Worker] = []
        self._case_number = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        # Its closing, by the end of this process too, is what tells the ranks that they are no longer wanted.
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._store: Any = None

    def run(
        self, world_size: int, function: Callable[..., Any], args: Any, kwargs: Any, timeout: float
    ) -> list[Any]:
        """Run `function(*args, **kwargs)` on ranks 0 to `world_size - 1` and return what each returned."""
        __tracebackhide__ = True  # pytest shows the test's line and the message
        reference = f"{function.__module__}:{function.__qualname__}"
        if "<" in reference:
            raise ValueError(
                f"{reference} cannot be imported by the ranks; define it at the top of its module"
            )
        self._case_number += 1
        arguments = pickle.dumps((args, kwargs))
        case = _Case(f"case{self._case_number}", reference, arguments, world_size, _free_port())
        try:
            self._start(world_size)
            workers = self._workers[:world_size]
            for worker in workers:
                worker.output_start = worker.output.stat().st_size
                worker.send(case)
            results = self._collect(workers, timeout, reference)
            # Only when all have their result may a rank leave: its peers may still be receiving from it.
            for worker in workers:
                worker.send("finish")
            threads = self._collect(workers, _FINISH_SECONDS, f"the end of {reference}")
        except BaseException:
            # A failed or interrupted case leaves ranks inside collectives, and their state unknown.
            self._kill()
            raise
        if max(threads) > _MOST_THREADS:
            self._kill()
        return results

    def close(self) -> None:
        """End all processes."""
        self._kill()
        for end in (self._lifeline_read, self._lifeline_write):
            os.close(end)
        self._folder.cleanup()

    def _start(self, count: int) -> None:
        from torch.distributed import TCPStore

        if self._store is None:
            self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        new = [self._spawn(rank) for rank in range(len(self._workers), count)]
        self._workers += new
        self._collect(new, _START_SECONDS, "the start of the ranks")

    def _spawn(self, rank: int) -> _Worker:
        ours, theirs = Pipe()
        folder = Path(self._folder.name)
        command = "from tests.helpers.ranks import _serve; _serve()"
        fds = (theirs.fileno(), self._lifeline_read)
        arguments = [str(value) for value in (rank, *fds, folder / f"rank{rank}.stacks", self._store.port)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        search_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment |= {
            "PYTHONPATH": search_path,
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Gloo looks up the host's name otherwise, which not every machine can resolve.
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            **self._environment,
        }
        with open(folder / f"rank{rank}.out", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", command, *arguments, self._backend, *self._hooks],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=fds,
                start_new_session=True,
            )
        theirs.close()
        return _Worker(rank, process, ours, folder)

    def _collect(self, workers: Sequence[_Worker], timeout: float, what: str) -> list[Any]:
        """One result of each worker, in order; RankError if one fails or none comes in time."""
        __tracebackhide__ = True
        pending: dict[Any, _Worker] = {worker.connection: worker for worker in workers}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}  # in the order in which they came: the first is the likeliest cause
        deadline = time.monotonic() + timeout
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                worker = pending.pop(connection)
                kind, value = worker.receive()
                if kind == "result":
                    results[worker.rank] = value
                else:
                    failures[worker.rank] = value
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if pending or failures:
            raise RankError(_describe(what, timeout, workers, failures, list(pending.values())))
        return [results[worker.rank] for worker in workers]

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


@dataclass(frozen=True)
class RankPool:
    """`world_size` ranks of some processes."""

    world_size: int
    processes: RankProcesses

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """Run `function(*args, **kwargs)` on every rank and return the results, rank 0 first.

        Args:
            function: defined at the top of an importable module.
            timeout: seconds until the case counts as hung.

        Raises:
            RankError: the case failed on a rank or did not end in time.
        """
        __tracebackhide__ = True
        return self.processes.run(self.world_size, function, args, kwargs, timeout)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _describe(
    what: str,
    timeout: float,
    workers: Sequence[_Worker],
    failures: dict[int, str],
    running: Sequence[_Worker],
) -> str:
    """The message of a RankError: why, then each rank's traceback or stack, then what the ranks printed."""
    for worker in running:
        worker.request_stack()
    if running:
        time.sleep(0.5)  # the signal handlers write their files
    ranks = ", ".join(str(rank) for rank in failures or [worker.rank for worker in running])
    if failures:
        parts = [f"{what} failed on rank {ranks} (of {len(workers)})"]
    else:
        parts = [f"{what} did not end within {timeout:g} s on rank {ranks} (of {len(workers)})"]
    same: dict[str, list[int]] = {}
    for rank, text in failures.items():
        same.setdefault(text, []).append(rank)
    for text, failed in same.items():
        parts.append(f"--- rank {', '.join(map(str, failed))} ---\n{text.rstrip()}")
    for worker in running:
        parts.append(f"--- rank {worker.rank}, still running, stack ---\n{worker.read_stacks()}")
    for worker in workers:
        with open(worker.output, "rb") as output:
            output.seek(worker.output_start)
            printed = output.read().decode(errors="replace").strip()
        if printed:
            parts.append(f"--- rank {worker.rank}, output ---\n{printed[-_SHOWN_OUTPUT:]}")
    return "\n\n".join(parts)


# What follows runs in the ranks.


def _serve() -> None:
    """A rank's whole life: the set-up, then cases until the connection or the lifeline closes."""
    rank, connection_fd, lifeline, stacks_path, store_port, backend, setup, teardown = sys.argv[1:]
    stacks = open(stacks_path, "w")  # noqa: SIM115 - faulthandler writes to it until the process ends
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    threading.Thread(target=_die_with_the_tests, args=(int(lifeline),), daemon=True).start()
    connection = Connection(int(connection_fd))
    os.environ.update(RANK=rank, LOCAL_RANK=rank, MASTER_ADDR=_HOST)

    def start() -> Any:
        if setup:
            _resolve(setup)()
        from torch.distributed import TCPStore

        return TCPStore(_HOST, int(store_port), is_master=False, wait_for_workers=False)

    store = _report(connection, start, send_value=False)
    while True:
        try:
            case = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        _report(connection, functools.partial(_run_case, case, int(rank), store, backend))
        if connection.recv_bytes():
            _report(connection, lambda: _end_case(teardown))


def _die_with_the_tests(lifeline: int) -> None:
    """End this rank and what it started when the tests' process is gone, even amid a collective that hangs."""
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def _report(connection: Connection, action: Callable[[], Any], send_value: bool = True) -> Any:
    """Send what `action` returns, or its traceback. Plain pickle: torch's own would share tensors' memory."""
    value = None
    try:
        value = action()
        message = pickle.dumps(("result", value if send_value else None))
    except BaseException as error:
        frames = error.__traceback__
        while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        message = pickle.dumps(("error", "".join(traceback.format_exception(error.with_traceback(frames)))))
    connection.send_bytes(message)
    return value


def _run_case(case: _Case, rank: int, store: Any, backend: str) -> Any:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore
    from torch.utils._pytree import tree_map_only

    os.environ.update(
        WORLD_SIZE=str(case.world_size),
        LOCAL_WORLD_SIZE=str(case.world_size),
        MASTER_PORT=str(case.master_port),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    world = PrefixStore(case.name, store)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=world, rank=rank, world_size=case.world_size, device_id=device)
    args, kwargs = pickle.loads(case.arguments)
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, _resolve(case.function)(*args, **kwargs))


def _end_case(teardown: str) -> int:
    """Forget the case. Returns how many threads are left."""
    import psutil
    import torch
    import torch.distributed as dist

    if teardown:
        _resolve(teardown)()
    if dist.is_initialized():
        dist.destroy_process_group()
    # Models and optimizers are reference cycles that hold process groups and their threads. What one collection frees
    # can set free more.
    while gc.collect():
        pass
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    gc.freeze()  # what is left stays: looking through all of Megatron after each case would take longer than most cases
    return psutil.Process().num_threads()


def _resolve(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value
