"""What the nodes of a run must have in common, found out before it costs anything.

Each node reads its own disk: the configuration of its own copy of the code, its own model folder and data. Where these
differ, ranks would wait for each other at different places, or train parts of different models on each other.
"""

import hashlib
import socket
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mpo_megatron
from mpo_megatron.config import Config, as_yaml, leaves
from mpo_megatron.errors import ConfigError
from mpo_megatron.runtime.parallel import ParallelLayout, raising_together
from mpo_megatron.runtime.publish import cannot_write

# Where a node has its files may be its own affair, but not whether it has any.
_PATHS = {
    "model.restore_from_path",
    "model.mpo.reference_from_path",
    "model.export_path",
    "model.data.train",
    "model.data.validation",
    "model.data.cache_dir",
    # Rank 0's are the run's.
    "exp_manager.exp_dir",
    "exp_manager.explicit_log_dir",
}
_ENDS_BYTES = 1 << 16
_SEEN_SECONDS = 10.0  # a network file system may show a new file late


def check_same_job(config: Config, layout: ParallelLayout) -> None:
    """Check that all ranks run the same configuration with the same software; all ranks call it.

    Raises:
        ConfigError: they do not; with the first difference.
    """
    mine = {
        "mpo_megatron": mpo_megatron.__version__,
        "megatron-core": version("megatron-core"),
        "torch": torch.__version__,
        **{key: "a path" if key in _PATHS and value else value for key, value in leaves(as_yaml(config))},
    }
    _check_same(
        "the ranks do not run the same job",
        mine,
        layout,
        "bring code, configuration and software of all nodes to one state",
    )


def check_same_model(key: str, folder: str | Path, layout: ParallelLayout) -> None:
    """Check that the model that a key of the configuration names has the same files on all nodes; all ranks call it.

    Of each file size, beginning and end are compared, which tells checkpoints of different training and files that were
    copied in part.

    Raises:
        ConfigError: they differ; with the first difference.
    """
    files = {}
    if layout.local_rank == 0:
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            if file.suffix in (".safetensors", ".json", ".distcp", ".model", ".jinja"):
                files[str(file.relative_to(folder))] = _ends(file)
    _check_same(
        f"{key}={folder} is not the same model on all nodes",
        files,
        layout,
        "copy it from one place, or put it on storage that all nodes share",
        only_first_ranks=True,
    )


def check_shared(folder: Path, layout: ParallelLayout) -> None:
    """Check that all ranks see the folder that rank 0 has; all ranks call it.

    Raises:
        ConfigError: a node has another storage there.
        CheckpointError: rank 0 cannot write there.
    """
    name = [""]
    with raising_together(layout):
        if layout.is_main:
            try:
                with tempfile.NamedTemporaryFile(prefix=".seen-", dir=folder, delete=False) as file:
                    name = [Path(file.name).name]
            except OSError as error:
                raise cannot_write(folder, error) from error
    dist.broadcast_object_list(name, src=0, group=layout.control)
    here = socket.gethostname()
    found: list[Any] = [None] * layout.world_size
    dist.all_gather_object(found, (here, _seen(folder / name[0])), group=layout.control)
    if layout.is_main:
        (folder / name[0]).unlink()
    blind = [rank for rank, (_, sees) in enumerate(found) if not sees]
    if blind:
        raise ConfigError(
            f"{folder} of rank 0 on {found[0][0]} is not there for {len(blind)} of {layout.world_size} ranks, such as "
            f"rank {blind[0]} on {found[blind[0]][0]}, and every rank writes its part of a checkpoint; set "
            "exp_manager.exp_dir to storage that all nodes share, or go without checkpoints "
            "(trainer.save_at_end=false trainer.save_interval=0 exp_manager.resume_if_exists=false)"
        )


def _seen(file: Path) -> bool:
    end = time.monotonic() + _SEEN_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _ends(file: Path) -> str:
    """Size, and a digest of beginning and end."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_ENDS_BYTES))
            stream.seek(max(0, size - _ENDS_BYTES))
            digest.update(stream.read(_ENDS_BYTES))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return f"{size} bytes, digest {digest.hexdigest()[:8]}"


def _check_same(
    problem: str, mine: dict[str, Any], layout: ParallelLayout, fix: str, only_first_ranks: bool = False
) -> None:
    """Compare `mine` over the ranks, or over each node's first; the first key that differs is told on all ranks."""
    everyone: list[Any] = [None] * layout.world_size
    # The values themselves travel where they differ, and not from a thousand ranks to a thousand.
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    speaks = layout.local_rank == 0 or not only_first_ranks
    dist.all_gather_object(everyone, digest if speaks else None, group=layout.control)
    kinds = {digest: rank for rank, digest in reversed(list(enumerate(everyone))) if digest is not None}
    if len(kinds) == 1:
        return
    a, b = sorted(kinds.values())[:2]
    told: list[Any] = [None] * layout.world_size
    dist.all_gather_object(
        told, (socket.gethostname(), mine) if layout.rank in (a, b) else None, group=layout.control
    )
    (host_a, of_a), (host_b, of_b) = told[a], told[b]
    key = next(key for key in {**of_a, **of_b} if _told(of_a, key) != _told(of_b, key))
    raise ConfigError(
        f"{problem}: {key} is {_told(of_a, key)} for rank {a} on {host_a} and {_told(of_b, key)} for rank {b} on "
        f"{host_b}; {fix}"
    )


def _told(values: dict[str, Any], key: str) -> Any:
    return values.get(key, "missing")
