"""Nothing of a run is left behind: what a rank has forked ends with the rank, and a rank ends with its launcher."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # of Linux
_POLL_SECONDS = 1.0
_forker = 0
_registered = False


def end_forks_with_this_process() -> None:
    """Have processes that are forked from now on killed when this one ends, however it does.

    A checkpoint's writers would wait for ever where their rank was killed with one of their locks.
    """
    global _registered
    if not _registered and sys.platform == "linux":
        _registered = True
        os.register_at_fork(before=_note_forker, after_in_child=_end_with_forker)


def _note_forker() -> None:
    global _forker
    _forker = os.getpid()


def _end_with_forker() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It has ended before the kernel was told.
    if os.getppid() != _forker:
        os._exit(1)


def end_with_launcher() -> None:
    """Have this rank end within seconds of torchrun, which started it: nobody else would end it in a collective.

    A process that somebody has started by hand may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher, rank = os.getppid(), os.environ["RANK"]

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL_SECONDS)
        # A progress bar may have begun the line.
        print(
            f"\nerror: torchrun (process {launcher}) has ended on {socket.gethostname()}, and so does its rank {rank}; "
            "the same command goes on from the newest checkpoint with exp_manager.resume_if_exists=true",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()
