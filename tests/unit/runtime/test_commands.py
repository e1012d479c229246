"""Commands as sub-processes: what ends them, what they hold, and what they said when they failed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mpo_megatron.runtime.commands import ROOT, as_arguments, run_to_end, torchrun, what_failed

# A program that starts another one and waits for it.
PARENT = """
import os, pathlib, signal, sys
from mpo_megatron.runtime.commands import run_to_end
lock = os.open(sys.argv[1] + "/lock", os.O_RDWR | os.O_CREAT)
import fcntl
fcntl.flock(lock, fcntl.LOCK_EX)
with open(sys.argv[1] + "/log", "wb") as log:
    run_to_end([sys.executable, "-c", sys.argv[2], sys.argv[1]], log, keeps=[lock], passes=[signal.SIGUSR1])
"""
# It takes SIGUSR1 as a message, and ends half a second after SIGTERM.
CHILD = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: (folder / "told").touch())
def end(*_):
    time.sleep(0.5)
    (folder / "ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
(folder / "pid.new").write_text(str(os.getpid()))
(folder / "pid.new").rename(folder / "pid")
while True:
    time.sleep(0.05)
"""


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_what_is_started_ends_with_a_killed_parent_and_holds_its_lock_until_then(tmp_path: Path) -> None:
    import fcntl

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), CHILD], env=environment)
    wait_for(tmp_path / "pid")
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / "told")
    parent.kill()
    parent.wait()
    with (tmp_path / "lock").open("rb") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wait_for(tmp_path / "ended")
        psutil.wait_procs([child], timeout=60)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_status_output_and_environment(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        program = "import os, sys; print(os.environ['MORE'], os.environ['OMP_NUM_THREADS']); sys.exit(3)"
        more = {"MORE": "x", "OMP_NUM_THREADS": "1"}
        assert run_to_end([sys.executable, "-c", program], log, environment=more) == 3
    assert (tmp_path / "log").read_text() == "x 1\n"


def test_the_sentence_of_a_failure() -> None:
    noise = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    traceback = (
        "Traceback (most recent call last):\n  File\n[rank0]: RuntimeError: shapes differ\n"
        "Traceback (most recent call last):\n"
    )
    assert what_failed(f"bar 1%\rbar 100%\rerror: beta is wrong\n{traceback}{noise}", 1) == "beta is wrong"
    assert what_failed(f"some text\n{traceback}{noise}", 1) == "RuntimeError: shapes differ"
    assert what_failed("torch.OutOfMemoryError: 3 GB\n", 1) == "torch.OutOfMemoryError: 3 GB"
    assert what_failed(noise, -9) == "the job ended with status -9 and no error message"
    # Of a tool, and of its command line.
    assert (
        what_failed("usage: score.py\nscore.py: --model x has no config.json\n", 1)
        == "--model x has no config.json"
    )
    usage = "usage: generate.py [-h]\ngenerate.py: error: unrecognized arguments: --topp 1\n"
    assert what_failed(usage, 2) == "unrecognized arguments: --topp 1"
    assert what_failed("usage: score.py\nscore.py: error: --scorer: no\n", 2) == "--scorer: no"


def test_ranks_meet_where_the_machine_does_not_know_its_own_name(tmp_path: Path) -> None:
    """As a container may have it; by default torchrun's agent then waits for itself without end."""
    hosts, rank = tmp_path / "hosts", tmp_path / "rank.py"
    hosts.write_text("127.0.0.1 localhost\n")
    rank.write_text(
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        # One write: torchrun's Python is unbuffered, and a print of parts mixes with another rank's.
        "os.write(1, f'rank {dist.get_rank()} of {dist.get_world_size()}\\n'.encode())\n"
    )
    nameless = f"mount --bind {hosts} /etc/hosts && hostname nowhere && ! getent hosts nowhere && "
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "--uts", "sh", "-c"]
    if subprocess.run([*isolated, f"{nameless} true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces of users, mounts and names here")
    command = shlex.join([*torchrun(2), str(rank)])
    done = subprocess.run(
        [*isolated, nameless + command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_a_signal_while_a_command_is_forked_ends_it(tmp_path: Path) -> None:
    """Python prints what is raised in a hook of fork, as by a handler that runs there, and goes on."""
    program = (
        "import os, signal, sys\n"
        "from mpo_megatron.runtime.commands import interrupt_on_signals, run_to_end\n"
        "interrupt_on_signals()\n"
        "os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGTERM))\n"
        "run_to_end([sys.executable, '-c', 'import time; time.sleep(600)'], sys.stderr.buffer)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == -signal.SIGINT  # of a KeyboardInterrupt that nobody catches
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_options_as_a_command_line() -> None:
    options = {"top_p": 0.5, "leave-out-failed": True, "device": None, "quiet": False, "judge_range": [1, 10],
               "judge-options": {"temperature": 0}}  # fmt: skip
    assert as_arguments(options) == [
        "--top-p", "0.5", "--leave-out-failed", "--judge-range", "1", "10", "--judge-options", '{"temperature": 0}',
    ]  # fmt: skip
