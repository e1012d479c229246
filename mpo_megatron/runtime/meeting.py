"""The ranks of a run find each other before there is any process group: none waits for one that has stopped.

A rank that cannot take part (another configuration, no model folder, no GPU on its node) comes all the same, and brings
its error. All ranks then raise it, so that rank 0 prints it wherever it was found.
"""

import datetime
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mpo_megatron.errors import ConfigError, UserError

LATEST = datetime.timedelta(minutes=15)  # after the first rank, for the last one to have started
_SHOWN = 4  # ranks that a message names


def find_store(timeout: datetime.timedelta) -> tuple[Any, int, int]:
    """(the store of all ranks, this rank, how many there are), as torchrun's environment says.

    With `--max-restarts` the agent of a job on one node has one store for all starts (torch 2.13): what the ranks of a
    start have left there would be taken for that of the next.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # Agents of several nodes count each their own, and agree on a new store.
    if restarts != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart-{restarts}", store)
    return store, rank, world_size


def meet(
    brought: torch.device | UserError,
    store: dist.Store,
    rank: int,
    world_size: int,
    latest: datetime.timedelta = LATEST,
) -> None:
    """Wait for all ranks, and go on only if none brings an error and all the same kind of device. Every rank calls it.

    Args:
        brought: what this rank will compute on, or why it cannot take part.
        latest: when the last rank has to have come.

    Raises:
        UserError: a rank's, on all ranks.
        ConfigError: some would compute on a GPU and others on the CPU, where each would wait for the others for ever;
            or not all have come.
    """
    kind = "error" if isinstance(brought, UserError) else brought.type
    name = f"rank {rank} on {socket.gethostname()}"
    number = store.add(f"meet/{kind}", 1)
    store.set(f"meet/{kind}/{number}", pickle.dumps((name, brought)))  # type: ignore[arg-type]  # it takes bytes
    store.set(f"meet/rank/{rank}", "")
    if store.add("meet/all", 1) == world_size:
        store.set("meet/complete", "")
    try:
        store.wait(["meet/complete"], latest)
    except dist.DistStoreError:
        missing = [str(n) for n in range(world_size) if not store.check([f"meet/rank/{n}"])]
        raise ConfigError(
            f"{len(missing)} of {world_size} ranks have not come within {latest.total_seconds() / 60:g} minutes (rank "
            f"{_some(missing, len(missing))}); find what stopped them in the logs of their nodes, then start again"
        ) from None
    error = _error(store, world_size)
    if error is not None:
        _part(store, world_size)
        raise error


def _error(store: dist.Store, world_size: int) -> UserError | None:
    """What keeps the ranks from starting, in the same words on all of them."""
    count = store.add("meet/error", 0)
    if count:
        error: UserError = pickle.loads(store.get("meet/error/1"))[1]
        where = _ranks(store, "error", count)
        # What all have found is of the configuration, and of no node.
        return (
            error
            if count == world_size
            else type(error)(f"{error} (on {count} of {world_size} ranks: {where})")
        )
    count = store.add("meet/cpu", 0)
    if 0 < count < world_size:
        return ConfigError(
            f"{count} of {world_size} ranks find no GPU ({_ranks(store, 'cpu', count)}) and the others do; mend "
            "these nodes (nvidia-smi, CUDA_VISIBLE_DEVICES), or set trainer.accelerator=cpu for all"
        )
    return None


def _ranks(store: dist.Store, kind: str, count: int) -> str:
    first = range(1, min(count, _SHOWN) + 1)
    return _some([pickle.loads(store.get(f"meet/{kind}/{number}"))[0] for number in first], count)


def _some(names: list[str], count: int) -> str:
    """The first of `count` names."""
    shown = names[:_SHOWN]
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


def _part(store: dist.Store, world_size: int) -> None:
    """Give all ranks time to read what was found: the store ends with the node that keeps it."""
    with suppress(dist.DistError):
        if store.add("meet/parted", 1) == world_size:
            store.set("meet/over", "")
        store.wait(["meet/over"], datetime.timedelta(seconds=10))


@contextmanager
def starting_together() -> Iterator[None]:
    """Run a block that comes before the ranks meet; what stops it on one, on whatever node, stops all.

    Raises:
        UserError: of any rank, on every rank.
    """
    try:
        yield
    except UserError as error:
        _bring(error)
        raise
    # Hydra ends the process where it cannot read a YAML, and libraries raise what they like.
    except (Exception, SystemExit) as error:
        if not isinstance(error, SystemExit) or error.code:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            with suppress(UserError):
                _bring(UserError(f"the run has not started ({reason}); the log of that node has the rest"))
        raise


def _bring(error: UserError) -> None:
    """Meet the other ranks, if there are any, with an error."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        store, rank, world_size = find_store(LATEST)
        meet(error, store, rank, world_size)
