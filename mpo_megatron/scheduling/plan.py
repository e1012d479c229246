"""Which groups share a row, and which data-parallel rank runs it. Pure: plain Python in, plain Python out.

The plan of a step depends on the groups' lengths, the token budget, the number of data-parallel ranks and the multiple
of rows that an interleaved pipeline needs, so the same groups make the same rows at every layout that shares those: the
alignment, which tensor and context parallelism set, changes only how far rows are padded.

A row holds **parts**: whole groups, or some of the responses of a group too large for one row, with its prompt. Rows
with parts of split groups run twice, first forward only for the log-probs that the whole group's loss needs.
Invariants, which `check_plan` states as code:

1. every response of every group is in exactly one part; a group that fits a row is whole;
2. no row holds more tokens than the budget;
3. a row holds whole groups or parts of split groups, never both, for a row that holds a part pays for the first pass;
   rows with parts come first on each rank, spread evenly over the ranks, and `first_pass` is the most that a rank has,
   rounded up to `rows_multiple`;
4. every rank has the same number of rows, at least one and a multiple of `rows_multiple`; a row may be empty: it is
   padding, and counts no group;
5. T, the padded length of every row of the step, is the least multiple of the alignment that fits the fullest row: it
   exceeds the budget, where that is no such multiple, by less than the alignment.

What the planner tries for, in this order: few rows; rows of nearly equal token counts, since all are padded to T; ranks
of nearly equal cost (FLOPs).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mpo_megatron.errors import ConfigError
from mpo_megatron.scheduling import balance
from mpo_megatron.scheduling.layout import GroupLengths

# Rows and ranks are not evened out any further once the fullest row, or the costliest rank, is within this of the least
# possible: padding to the alignment and a step's time vary by more.
TOKEN_TOLERANCE = 1 / 512
COST_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Part:
    """Some of a group's responses, with their prompt: what a row holds. A whole group is the part with all of them."""

    group: int  # position of the group in the list that was planned
    responses: tuple[int, ...]  # which of its responses, ascending


Row = tuple[Part, ...]


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward pass by what a row holds (a matrix product counts 2 per multiply-add)."""

    per_token: float
    per_attention_pair: float
    per_response_token: float

    def of(self, group: GroupLengths, shared_prompt: bool) -> float:
        return (
            self.per_token * group.row_tokens(shared_prompt)
            + self.per_attention_pair * group.attention_pairs(shared_prompt)
            + self.per_response_token * sum(group.responses)
        )


@dataclass(frozen=True)
class StepPlan:
    """The rows of one step.

    Attributes:
        rows: `rows[d]` are those of data-parallel rank d, the ones with parts of split groups first.
        row_tokens: T, the length that every row is padded to.
        first_pass: rows of each rank, from the front, that the forward-only first pass runs; 0 if nothing is split.
        split: ascending, the groups that lie in more than one part.
    """

    rows: tuple[tuple[Row, ...], ...]
    row_tokens: int
    first_pass: int
    split: tuple[int, ...]

    @property
    def rows_per_rank(self) -> int:
        return len(self.rows[0])


def plan_step(
    groups: Sequence[GroupLengths],
    *,
    max_tokens: int,
    data_parallel: int,
    cost: CostModel,
    alignment: int = 1,
    shared_prompt: bool = True,
    rows_multiple: int = 1,
) -> StepPlan:
    """Put the groups of a global step into rows, and the rows on data-parallel ranks.

    Args:
        groups: lengths of the step's groups.
        max_tokens: token budget of a row, padding left out.
        data_parallel: ranks among which the rows are shared out.
        cost: what a part costs, for the balance.
        alignment: T is a multiple of it; nothing else depends on it.
        shared_prompt: whether a row stores a group's prompt once.
        rows_multiple: each rank's number of rows, in either pass, is a multiple of it.

    Raises:
        ConfigError: a prompt with one of its responses is above the budget.
    """
    _check_budget(groups, max_tokens)
    tokens_of_groups = [group.row_tokens(shared_prompt) for group in groups]
    split = tuple(i for i, tokens in enumerate(tokens_of_groups) if tokens > max_tokens)
    pieces = [Part(i, piece) for i in split for piece in _cut(groups[i], max_tokens, shared_prompt)]
    whole = [
        Part(i, tuple(range(len(group.responses))))
        for i, group in enumerate(groups)
        if tokens_of_groups[i] <= max_tokens
    ]
    parts = pieces + whole
    lengths = [groups[part.group].part(part.responses) for part in parts]
    tokens = [part.row_tokens(shared_prompt) for part in lengths]
    costs = [cost.of(part, shared_prompt) for part in lengths]

    rows, split_rows = _fill_rows(
        tokens, len(pieces), max_tokens, data_parallel=data_parallel, rows_multiple=rows_multiple
    )
    hands = _deal_rows(rows, split_rows, costs, tokens, data_parallel)
    fullest = max(sum(tokens[p] for p in row) for row in rows)
    return StepPlan(
        rows=tuple(tuple(tuple(parts[p] for p in sorted(rows[r])) for r in hand) for hand in hands),
        row_tokens=max(alignment, _round_up(fullest, alignment)),
        first_pass=_round_up(math.ceil(split_rows / data_parallel), rows_multiple),
        split=split,
    )


def _check_budget(groups: Sequence[GroupLengths], max_tokens: int) -> None:
    """Raise ConfigError if a prompt with its longest response does not fit a row."""
    needed = [group.prompt + max(group.responses) for group in groups]
    largest = max(needed, default=0)
    if largest > max_tokens:
        group = groups[needed.index(largest)]
        raise ConfigError(
            f"model.max_tokens_per_micro_batch={max_tokens} is less than the {largest} tokens of a prompt with one of "
            f"its responses (prompt {group.prompt} + response {max(group.responses)}), the least that a row must hold; "
            f"raise it to at least {largest}, or lower model.data.max_length"
        )


def _cut(group: GroupLengths, max_tokens: int, shared_prompt: bool) -> list[tuple[int, ...]]:
    """The responses of each part of a group above the budget: few parts, of nearly equal token counts."""
    weights = [length if shared_prompt else group.prompt + length for length in group.responses]
    capacity = max_tokens - group.prompt if shared_prompt else max_tokens
    count = math.ceil(sum(weights) / capacity)
    while (bins := balance.fit(weights, count, capacity, goal=math.ceil(sum(weights) / count))) is None:
        count += 1
    return sorted(tuple(sorted(items)) for items in bins)


def _fill_rows(
    tokens: Sequence[int],
    num_pieces: int,
    max_tokens: int,
    *,
    data_parallel: int,
    rows_multiple: int,
) -> tuple[balance.Bins, int]:
    """The parts of each row, and how many of the rows, the first ones, hold parts of split groups.

    Args:
        tokens: of each part; the first `num_pieces` parts are those of split groups.
    """
    pieces, whole = tokens[:num_pieces], tokens[num_pieces:]
    # As many rows as first-fit-decreasing needs always do; fewer may, since rows come `unit` at a time.
    piece_rows = len(balance.first_fit_decreasing(pieces, max_tokens))
    whole_rows = len(balance.first_fit_decreasing(whole, max_tokens))
    least_whole_rows = math.ceil(sum(whole) / max_tokens)
    unit = data_parallel * rows_multiple
    most_split_rows = min(num_pieces, _round_up(piece_rows, unit))  # without a longer first pass

    def fill(num_rows: int) -> tuple[balance.Bins, int] | None:
        def needed(split_rows: int) -> int:
            return max(_even_load(pieces, split_rows), _even_load(whole, num_rows - split_rows))

        choices = range(piece_rows, max(piece_rows, min(most_split_rows, num_rows - whole_rows)) + 1)
        split_rows = min(choices, key=needed)
        goal = min(max_tokens, needed(split_rows) * (1 + TOKEN_TOLERANCE))
        of_pieces = balance.fit(pieces, split_rows, max_tokens, goal)
        of_whole = balance.fit(whole, num_rows - split_rows, max_tokens, goal)
        if of_pieces is None or of_whole is None:
            return None
        # An empty row is no row with parts.
        with_parts, empty = [row for row in of_pieces if row], [row for row in of_pieces if not row]
        without = [[num_pieces + item for item in row] for row in of_whole]
        return with_parts + without + empty, len(with_parts)

    num_rows = max(unit, _round_up(piece_rows + whole_rows, unit))
    filled = fill(num_rows)
    while num_rows - unit >= max(unit, piece_rows + least_whole_rows):
        num_rows -= unit
        if (tighter := fill(num_rows)) is None:
            break
        filled = tighter
    assert filled is not None, "first-fit-decreasing's number of rows is enough"
    return filled


def _even_load(tokens: Sequence[int], num_rows: int) -> int:
    """Tokens of the fullest row if all were equally full, but for one that holds the largest part."""
    return max(math.ceil(sum(tokens) / num_rows), max(tokens)) if tokens else 0


def _deal_rows(
    rows: balance.Bins,
    split_rows: int,
    costs: Sequence[float],
    tokens: Sequence[int],
    data_parallel: int,
) -> balance.Bins:
    """The rows of each rank, those of split groups first.

    Parts change places between `rows`, in place, where that evens out the ranks' costs without a fuller fullest row.
    """
    fullest = max(sum(tokens[p] for p in row) for row in rows)
    hands: balance.Bins = [[] for _ in range(data_parallel)]
    base = [0.0] * data_parallel
    for dealt in (range(split_rows), range(split_rows, len(rows))):
        row_costs = [sum(costs[p] for p in row) for row in rows]
        goal = (sum(base) + sum(row_costs[r] for r in dealt)) / data_parallel * (1 + COST_TOLERANCE)
        dealt_hands = balance.deal(row_costs, dealt, [len(hand) for hand in hands], base)
        balance.even_out(dealt_hands, row_costs, goal, base=base, keep_counts=True)
        balance.trade(dealt_hands, rows, costs, tokens, fullest, goal, base=base)
        for d, hand in enumerate(dealt_hands):
            hands[d] += sorted(hand)
            base[d] += sum(costs[p] for r in hand for p in rows[r])
    return hands


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def check_plan(
    plan: StepPlan,
    groups: Sequence[GroupLengths],
    *,
    max_tokens: int,
    data_parallel: int,
    alignment: int = 1,
    shared_prompt: bool = True,
    rows_multiple: int = 1,
) -> None:
    """Assert every invariant of the module's docstring."""
    assert len(plan.rows) == data_parallel, "not one list of rows per data-parallel rank"
    lengths = {len(rank_rows) for rank_rows in plan.rows}
    assert len(lengths) == 1, f"ranks have different numbers of rows, {sorted(lengths)}"
    assert plan.rows_per_rank >= 1, "ranks have no row"
    assert plan.rows_per_rank % rows_multiple == 0, (
        f"{plan.rows_per_rank} rows per rank are not a multiple of {rows_multiple}"
    )

    rows = [row for rank_rows in plan.rows for row in rank_rows]
    parts = [part for row in rows for part in row]
    placed = sorted((part.group, response) for part in parts for response in part.responses)
    assert placed == [(i, r) for i, group in enumerate(groups) for r in range(len(group.responses))], (
        "a response is missing or in two parts"
    )
    assert all(part.responses for part in parts), "a part has no response"
    assert all(list(part.responses) == sorted(part.responses) for part in parts), (
        "a part's responses are not in ascending order"
    )

    parts_of = Counter(part.group for part in parts)
    split = tuple(i for i in range(len(groups)) if parts_of[i] > 1)
    assert plan.split == split, f"groups {split} lie in more than one part, but `split` is {plan.split}"
    assert all(groups[i].row_tokens(shared_prompt) > max_tokens for i in split), (
        "a group that fits a row is split"
    )
    _check_first_pass(plan, rows_multiple)

    filled = [
        sum(groups[part.group].part(part.responses).row_tokens(shared_prompt) for part in row) for row in rows
    ]
    fullest = max(filled)
    assert fullest <= max_tokens, f"a row of {fullest} tokens is above the budget of {max_tokens}"
    assert plan.row_tokens % alignment == 0, f"T={plan.row_tokens} is not a multiple of the alignment"
    assert plan.row_tokens == max(alignment, _round_up(fullest, alignment)), (
        f"T={plan.row_tokens} is not the least that fits {fullest} tokens"
    )


def _check_first_pass(plan: StepPlan, rows_multiple: int) -> None:
    """Assert the third invariant of the module's docstring."""
    split = set(plan.split)
    counts = []
    for rank_rows in plan.rows:
        in_split = [[part.group in split for part in row] for row in rank_rows]
        has_parts = [any(flags) for flags in in_split]
        assert has_parts == [bool(flags) and all(flags) for flags in in_split], (
            "a row holds a whole group beside a part of another"
        )
        assert has_parts == sorted(has_parts, reverse=True), "rows with parts do not come first"
        counts.append(sum(has_parts))
    assert max(counts) - min(counts) <= 1, f"ranks have {counts} rows with parts: not spread evenly"
    assert plan.first_pass == _round_up(max(counts), rows_multiple), (
        f"first_pass is {plan.first_pass}, but ranks have {counts} rows with parts"
    )
