"""Mistakes that train without an error, put into the real code for one case: the layout tests must find each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from mpo_megatron.model import context_keys, provider
from mpo_megatron.ragged.reads import Reads
from mpo_megatron.ragged.segments import Segments
from mpo_megatron.scheduling import rows
from mpo_megatron.scheduling.layout import Span
from mpo_megatron.scheduling.pack import PackedRow
from mpo_megatron.training import step
from tests.distributed.jobs import Layout


def run_with(fault: str, case: Callable[..., Any], *args: Any) -> Any:
    """Run a case with a fault of `FAULTS` in place, and take it out again."""
    with globals()[f"_{fault}"]():
        return case(*args)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module or class is another one for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _with_rows(change: Callable[[PackedRow], PackedRow]) -> Any:
    pack_row = rows.pack_row
    return replaced(rows, "pack_row", lambda *args, **kwargs: change(pack_row(*args, **kwargs)))


def _last_prompt_position_predicts_once() -> Any:
    """Of the first tokens of a group's responses, only the first one's is a target."""

    def change(row: PackedRow) -> PackedRow:
        kept, seen = [], set()
        for n, place in enumerate(row.reads.places.tolist()):
            if place not in seen:
                kept.append(n)
            seen.add(place)
        return replace(
            row,
            reads=Reads.of(row.reads.places[kept].numpy(), row.tokens.numel()),
            targets=row.targets[kept],
            by_response=Segments.of(row.by_response.segment[kept].numpy(), row.num_responses),
        )

    return _with_rows(change)


def _positions_not_reset() -> Any:
    return _with_rows(lambda row: replace(row, position_ids=torch.arange(row.position_ids.numel())))


def _group_counted_on_every_context_rank() -> Any:
    return _with_rows(lambda row: replace(row, counted_groups=row.num_groups))


def _group_counted_with_every_part() -> Any:
    return _with_rows(lambda row: replace(row, counted_groups=row.num_groups))


def _plan_leaves_a_group_out() -> Any:
    """The last row that holds anything lacks its last part; the plan's own check is off."""
    plan_step = rows.plan_step

    def plan(*args: Any, **kwargs: Any) -> Any:
        whole = plan_step(*args, **kwargs)
        *others, last = whole.rows
        shortened = tuple(row[:-1] if row == last[0] else row for row in last)
        return replace(whole, rows=(*others, shortened))

    @contextmanager
    def both() -> Iterator[None]:
        with replaced(rows, "plan_step", plan), replaced(rows, "check_plan", lambda *a, **k: None):
            yield

    return both()


def _keys_left_in_the_order_of_the_ranks() -> Any:
    """Context parallelism gathers keys and values rank after rank, and nobody puts them into the row's order."""

    def in_rank_order(row_tokens: int, size: int, rank: int) -> Any:
        part = row_tokens // size
        return (Span(rank * part, part),)

    return replaced(context_keys, "context_spans", in_rank_order)


def _first_pass_forgotten_on_other_replicas() -> Any:
    """The log-probs of a split group's parts on other data-parallel ranks count as 0."""
    return replaced(step, "dist", SimpleNamespace(all_reduce=_all_reduce_over_the_world_only))


def _all_reduce_over_the_world_only(tensor: torch.Tensor, group: Any = None) -> None:
    if group is None:
        dist.all_reduce(tensor)


def _weights_from_the_part_alone() -> Any:
    """A part of a split group is trained as if it were the whole group."""
    objective_loss = step.objective_loss

    def of_parts(*args: Any) -> Any:
        loss = objective_loss(*args)
        first_pass_done = len(args) == 3
        return lambda row, output: loss(replace(row, split_slots=None) if first_pass_done else row, output)

    return replaced(step, "objective_loss", of_parts)


def _batched_sends_between_interleaved_stages() -> Any:
    config = provider.transformer_config

    def batched(*args: Any, **kwargs: Any) -> Any:
        made = config(*args, **kwargs)
        made.batch_p2p_comm, made.overlap_p2p_comm = True, False
        return made

    return replaced(provider, "transformer_config", batched)


def _qk_norm_gradients_left_on_their_rank() -> Any:
    """Megatron is not told of the norms of queries and keys, so it does not sum their gradients over the ranks."""
    finalize_model_grads = provider.finalize_model_grads

    def untold(models: list[Any], *args: Any, **kwargs: Any) -> None:
        get_model_config(models[0]).qk_layernorm = False
        finalize_model_grads(models, *args, **kwargs)

    return replaced(provider, "finalize_model_grads", untold)


def _experts_gradients_summed_with_those_of_others() -> Any:
    """Experts take part in the all-reduce of the other weights' gradients, with the rank that holds other experts."""

    def unmark(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]

    return replaced(provider, "_mark_experts", unmark)


# What runs each: (ranks, layout, rows of whole groups or of parts).
FAULTS: dict[str, tuple[int, Layout, str]] = {
    "last_prompt_position_predicts_once": (1, Layout(), "whole"),
    "positions_not_reset": (1, Layout(), "whole"),
    "group_counted_on_every_context_rank": (2, Layout(cp=2), "whole"),
    "group_counted_with_every_part": (1, Layout(), "split"),
    "plan_leaves_a_group_out": (2, Layout(), "whole"),
    "keys_left_in_the_order_of_the_ranks": (2, Layout(cp=2), "whole"),
    "first_pass_forgotten_on_other_replicas": (2, Layout(), "split"),
    "weights_from_the_part_alone": (2, Layout(pp=2), "split"),
    "batched_sends_between_interleaved_stages": (2, Layout(pp=2, vpp=2), "whole"),
}
# A part of a group may hold preferred responses alone: as a whole group it has no finite loss.
NOT_FINITE = {"weights_from_the_part_alone"}
