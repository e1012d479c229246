"""Signs of life: each rank gives one every other second, and one that gives none ends all, by name.

A rank that is stopped, or whose process is gone without a word, holds the others in their next collective, for as long
as that may take (`trainer.distributed_timeout_minutes`), and they then cannot tell which rank it was. So a thread of
each rank counts up in the store by which the ranks have found each other, and watches the next rank: n ranks need n
writes and 2 n reads an interval.
"""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mpo_megatron.runtime.parallel import ParallelLayout

_INTERVAL_SECONDS = 2.0
_LOST = "pulse/lost"
_ENDED = b"ended"
_KEEPER = "rank 0, or the torchrun that keeps the store of the ranks,"


class Pulse:
    """This rank's signs of life, and its eye on the next one's. Every rank makes it, and closes it at the end.

    Args:
        store: of all ranks; a connection of its own.
        limit: seconds after which a rank without a sign counts as lost.
    """

    def __init__(self, store: Any, rank: int, world_size: int, limit: float) -> None:
        self._store, self._rank, self._world_size, self._limit = store, rank, world_size, limit
        self._interval = min(_INTERVAL_SECONDS, limit / 4)
        self._closed = threading.Event()
        self._answered_at = time.monotonic()
        store.set(f"pulse/where/{rank}", f"rank {rank} on {socket.gethostname()} (process {os.getpid()})")
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_the_store, name="pulse-store", daemon=True).start()

    def close(self) -> bool:
        """This rank is about to end, and nobody is to miss it. Returns whether the store still answers."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join(self._limit)
            if not self._thread.is_alive():
                # Else it is gone with the rank that kept it, which has come to its end.
                with contextlib.suppress(dist.DistError):
                    self._store.set(f"pulse/{self._rank}", _ENDED.decode())
        return not self._thread.is_alive()

    def silent(self) -> dict[int, str]:
        """Close, and find out which ranks give no signs of life: the cause where a collective has failed here.

        Returns:
            By rank, where it was. Rank 0, too, where the store does not answer.
        """
        if self.close():
            with contextlib.suppress(dist.DistError):
                before = self._signs()
                time.sleep(2.5 * self._interval)
                after = self._signs()
                lost = [rank for rank, sign in after.items() if sign == before[rank] != _ENDED]
                return {rank: self._store.get(f"pulse/where/{rank}").decode() for rank in lost}
        return {0: _KEEPER}

    def _signs(self) -> dict[int, bytes]:
        return {rank: self._store.get(f"pulse/{rank}") for rank in range(self._world_size)}

    def _beat(self, number: int) -> None:
        self._store.set(f"pulse/{self._rank}", str(number))

    def _run(self) -> None:
        following = (self._rank + 1) % self._world_size
        number, seen, seen_at = 0, b"", time.monotonic()
        for stopped in self._intervals():
            now = time.monotonic()
            try:
                number += 1
                self._beat(number)
                sign = self._store.get(f"pulse/{following}")
                if sign != seen or sign == _ENDED or stopped:
                    seen, seen_at = sign, now
                elif now - seen_at > self._limit:
                    self._store.set(_LOST, f"{following}")
                if self._store.check([_LOST]):
                    self._end(int(self._store.get(_LOST)))
                self._answered_at = now
            # `_watch_the_store` sees to it.
            except dist.DistError:
                continue

    def _watch_the_store(self) -> None:
        """From a thread of its own: a question to a store that is stopped has no end, whatever its time limit."""
        for stopped in self._intervals():
            if stopped:
                self._answered_at = time.monotonic()
            # The store has its own limit until it says that there is no answer.
            elif (silent := time.monotonic() - self._answered_at) > 1.5 * self._limit:
                _leave(
                    f"{_KEEPER} has given no sign of life for {silent:.0f} s, and rank {self._rank} ends; look at the "
                    "log of that node, and start the same command again with exp_manager.resume_if_exists=true"
                )

    def _intervals(self) -> Iterator[bool]:
        """Until this is closed, after each interval: whether this process, or the whole machine, was stopped in it."""
        began = time.monotonic()
        while not self._closed.wait(self._interval):
            yield time.monotonic() - began > self._interval + self._limit / 2
            began = time.monotonic()

    def _end(self, lost: int) -> None:
        where = self._store.get(f"pulse/where/{lost}").decode()
        # The first rank, or the one after it where that is lost.
        speaks = self._rank == (0 if lost != 0 else 1)
        _leave(
            f"{where} has given no sign of life for {self._limit:.3g} s, and all ranks end "
            "(trainer.heartbeat_timeout_minutes); look at its node, and start the same command again with "
            "exp_manager.resume_if_exists=true"
            if speaks
            else ""
        )


def start_pulse(layout: ParallelLayout, minutes: float) -> Pulse | None:
    """The signs of life of this rank; None where there is no other, or no limit. Every rank calls it."""
    if layout.world_size == 1 or not minutes:
        return None
    store = _get_default_store()
    # Not before torch 2.7; a wait of the main thread then holds the signs up.
    if hasattr(store, "clone"):
        store = store.clone()
        store.set_timeout(datetime.timedelta(minutes=minutes))
    return Pulse(store, layout.rank, layout.world_size, 60 * minutes)


def _leave(sentence: str) -> None:
    """End this process, whatever its main thread waits for."""
    if sentence:
        # A progress bar may have begun the line.
        print(f"\nerror: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
