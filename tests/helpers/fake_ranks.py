"""This process as one rank of a world whose groups send nothing: to look at what a rank of a large layout holds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from mpo_megatron.runtime.parallel import ParallelLayout, current_layout


@contextmanager
def as_rank(rank: int, tp: int, pp: int, vpp: int, ep: int = 1) -> Iterator[ParallelLayout]:
    """A rank of `tp * pp * ep` ranks: the experts are shared by as many data-parallel ranks."""
    dist.init_process_group("fake", rank=rank, world_size=tp * pp * ep, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            vpp if vpp > 1 else None,
            expert_model_parallel_size=ep,
            create_gloo_process_groups=False,
        )
        yield current_layout(torch.device("cpu"))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
