"""Which groups share a row, and which data-parallel rank runs it. Pure: plain Python in, plain Python out.

The plan of a step depends on the groups' lengths, the token budget, the number of data-parallel ranks and the pipeline,
so the same groups make the same rows at every layout that shares those: the alignment, which tensor and context
parallelism set, changes only how far rows are padded.

A row holds **parts**: whole groups, or some of the responses of a group too large for one row, with its prompt. Rows
with parts of split groups run twice, first forward only for the log-probs that the whole group's loss needs.
Invariants, which `check_plan` states as code:

1. every response of every group is in exactly one part; a group that fits a row is whole;
2. no row holds more tokens than the budget;
3. a row holds whole groups or parts of split groups, never both, for a row that holds a part pays for the first pass;
   rows with parts come first on each rank, spread evenly over the ranks, and `first_pass` is the most that a rank has,
   rounded up to the pipeline's `rows_multiple`;
4. every rank has the same number of rows, at least one and a multiple of `rows_multiple`; a row may be empty: it is
   padding, and counts no group;
5. a row is padded to the least multiple of the alignment that fits it; between the stages of a pipeline all tensors
   have one shape, so there every row of the step is padded as the fullest is. So a row may exceed the budget, where
   that is no multiple of the alignment, by less than the alignment.

What the planner tries for: as few rows as there can be or, in a pipeline, the number of rows that takes least time
(more rows are shorter and fill the pipeline better, fewer have less padding); rows of nearly equal token counts, so
that none needs more memory or padding than it must; ranks of nearly equal cost (FLOPs).
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
# What a row costs besides what it holds (kernel launches, small matrix products), as tokens. It keeps a pipeline from
# very short rows; an estimate, not measured on a GPU.
ROW_OVERHEAD_TOKENS = 64
# In a pipeline, each number of rows that is tried is above the one before by at least this part of it.
ROWS_STEP = 1 / 16


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

    def forward(self, tokens: float, attention_pairs: float, response_tokens: float) -> float:
        return (
            self.per_token * tokens
            + self.per_attention_pair * attention_pairs
            + self.per_response_token * response_tokens
        )

    def of(self, group: GroupLengths, shared_prompt: bool) -> float:
        return self.forward(
            group.row_tokens(shared_prompt), group.attention_pairs(shared_prompt), sum(group.responses)
        )


@dataclass(frozen=True)
class Pipeline:
    """What pipeline parallelism asks of a plan.

    Attributes:
        stages: pipeline-parallel size.
        chunks: model chunks on each stage; more than one are interleaved.
    """

    stages: int = 1
    chunks: int = 1

    @property
    def rows_multiple(self) -> int:
        """Each rank's number of rows is a multiple of it: Megatron's interleaved schedule asks for that."""
        return self.stages if self.chunks > 1 else 1

    @property
    def idle_rows(self) -> float:
        """Rows that a stage could run in the time that it waits while the pipeline fills and drains."""
        return (self.stages - 1) / self.chunks


NO_PIPELINE = Pipeline()


@dataclass(frozen=True)
class StepPlan:
    """The rows of one step.

    Attributes:
        rows: `rows[d]` are those of data-parallel rank d, the ones with parts of split groups first.
        row_lengths: `row_lengths[d][k]` is T of row `rows[d][k]`: what it is padded to.
        first_pass: rows of each rank, from the front, that the forward-only first pass runs; 0 if nothing is split.
        split: ascending, the groups that lie in more than one part.
    """

    rows: tuple[tuple[Row, ...], ...]
    row_lengths: tuple[tuple[int, ...], ...]
    first_pass: int
    split: tuple[int, ...]

    @property
    def rows_per_rank(self) -> int:
        return len(self.rows[0])

    @property
    def longest_row(self) -> int:
        """The largest T of the step."""
        return max(max(lengths) for lengths in self.row_lengths)

    @property
    def padded_tokens(self) -> int:
        """Tokens of all rows of all ranks, padding included; a first pass over some of them is not counted again."""
        return sum(sum(lengths) for lengths in self.row_lengths)


def plan_step(
    groups: Sequence[GroupLengths],
    *,
    max_tokens: int,
    data_parallel: int,
    cost: CostModel,
    alignment: int = 1,
    shared_prompt: bool = True,
    pipeline: Pipeline = NO_PIPELINE,
) -> StepPlan:
    """Put the groups of a global step into rows, and the rows on data-parallel ranks.

    Args:
        groups: lengths of the step's groups.
        max_tokens: token budget of a row, padding left out.
        data_parallel: ranks among which the rows are shared out.
        cost: what a part costs, for the balance and for the number of a pipeline's rows.
        alignment: the length of a row is a multiple of it; nothing else depends on it.
        shared_prompt: whether a row stores a group's prompt once.
        pipeline: stages and model chunks.

    Raises:
        ConfigError: a prompt with one of its responses is above the budget.
    """
    check_budget(groups, max_tokens)
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

    filling = _Filling(tokens, costs, len(pieces), max_tokens, data_parallel, cost, pipeline)
    rows, split_rows = filling.fewest_rows()
    if pipeline.stages > 1:
        rows, split_rows = filling.fastest_rows(rows, split_rows)
    hands = _deal_rows(rows, split_rows, costs, tokens, data_parallel)
    row_lengths = [
        [max(alignment, _round_up(_load(rows[r], tokens), alignment)) for r in hand] for hand in hands
    ]
    if pipeline.stages > 1:
        longest = max(max(of_rank) for of_rank in row_lengths)
        row_lengths = [[longest] * len(of_rank) for of_rank in row_lengths]
    return StepPlan(
        rows=tuple(tuple(tuple(parts[p] for p in sorted(rows[r])) for r in hand) for hand in hands),
        row_lengths=tuple(map(tuple, row_lengths)),
        first_pass=filling.first_pass(split_rows),
        split=split,
    )


def check_budget(groups: Sequence[GroupLengths], max_tokens: int) -> None:
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


class _Filling:
    """Ways to put parts into rows: of parts, the first `num_pieces` are those of split groups.

    A filling is the parts of each row, and how many of the rows, the first ones, hold parts of split groups.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        costs: Sequence[float],
        num_pieces: int,
        max_tokens: int,
        data_parallel: int,
        cost: CostModel,
        pipeline: Pipeline,
    ) -> None:
        self.tokens, self.num_pieces, self.max_tokens = tokens, num_pieces, max_tokens
        self.pieces, self.whole = tokens[:num_pieces], tokens[num_pieces:]
        self.data_parallel, self.pipeline = data_parallel, pipeline
        # Rows come so many at a time.
        self.unit = data_parallel * pipeline.rows_multiple
        # As many rows as first-fit-decreasing needs always do.
        self.piece_rows = len(balance.first_fit_decreasing(self.pieces, max_tokens))
        self.whole_rows = len(balance.first_fit_decreasing(self.whole, max_tokens))
        self.per_token = cost.per_token
        # FLOPs of all parts apart from those that padding costs as well.
        self.beside_tokens = sum(costs) - cost.per_token * sum(tokens)

    def fewest_rows(self) -> tuple[balance.Bins, int]:
        """As few rows as are found; fewer than first-fit-decreasing's may do, since rows come `unit` at a time."""
        least = self.piece_rows + math.ceil(sum(self.whole) / self.max_tokens)
        num_rows = max(self.unit, _round_up(self.piece_rows + self.whole_rows, self.unit))
        filled = self.fill(num_rows)
        while num_rows - self.unit >= max(self.unit, least):
            num_rows -= self.unit
            if (tighter := self.fill(num_rows)) is None:
                break
            filled = tighter
        assert filled is not None, "first-fit-decreasing's number of rows is enough"
        return filled

    def fastest_rows(self, rows: balance.Bins, split_rows: int) -> tuple[balance.Bins, int]:
        """Of the filling with the fewest rows and those with more, the one that a pipeline ends first."""
        total, largest = sum(self.tokens), max(self.tokens, default=0)
        fastest, least = (rows, split_rows), self.time(len(rows), split_rows, self.fullest(rows))
        bounds = []
        num_rows = len(rows)
        # Where a row is no longer than the largest part, more rows are no shorter.
        while num_rows * largest < total:
            num_rows += _round_up(math.ceil(num_rows * ROWS_STEP), self.unit)
            bounds.append(
                (self.time(num_rows, self.piece_rows, _even_load(total, largest, num_rows)), num_rows)
            )
        for bound, num_rows in sorted(bounds):
            if bound >= least:
                break
            if (filled := self.fill(num_rows)) is None:
                continue
            time = self.time(num_rows, filled[1], self.fullest(filled[0]))
            if time < least:
                fastest, least = filled, time
        return fastest

    def fill(self, num_rows: int) -> tuple[balance.Bins, int] | None:
        """A filling of so many rows, the fullest as short as it is found; None where none is found."""
        pieces = self.pieces
        # Rows with parts run twice: no more of them than the step has for their share of its tokens.
        share = math.ceil(num_rows * sum(pieces) / max(1, sum(self.tokens)))
        most = min(len(pieces), _round_up(max(self.piece_rows, share), self.unit), num_rows - self.whole_rows)
        total, largest = sum(pieces), max(pieces, default=0)
        total_whole, largest_whole = sum(self.whole), max(self.whole, default=0)

        def needed(split_rows: int) -> int:
            return max(
                _even_load(total, largest, split_rows),
                _even_load(total_whole, largest_whole, num_rows - split_rows),
            )

        split_rows = min(range(self.piece_rows, max(self.piece_rows, most) + 1), key=needed)
        goal = min(self.max_tokens, needed(split_rows) * (1 + TOKEN_TOLERANCE))
        of_pieces = balance.fit(pieces, split_rows, self.max_tokens, goal)
        of_whole = balance.fit(self.whole, num_rows - split_rows, self.max_tokens, goal)
        if of_pieces is None or of_whole is None:
            return None
        # An empty row is no row with parts.
        with_parts, empty = [row for row in of_pieces if row], [row for row in of_pieces if not row]
        without = [[self.num_pieces + item for item in row] for row in of_whole]
        return with_parts + without + empty, len(with_parts)

    def fullest(self, rows: balance.Bins) -> int:
        return max(_load(row, self.tokens) for row in rows)

    def first_pass(self, split_rows: int) -> int:
        """Rows of each rank that the first pass runs, if so many rows of all ranks hold parts of split groups."""
        return _round_up(math.ceil(split_rows / self.data_parallel), self.pipeline.rows_multiple)

    def time(self, num_rows: int, split_rows: int, fullest: int) -> float:
        """How long a step takes, in FLOPs of the whole model; a backward pass is two forward passes."""
        first_pass = self.first_pass(split_rows)
        passes = 3 * (num_rows / self.data_parallel + self.pipeline.idle_rows)
        if first_pass:
            passes += first_pass + self.pipeline.idle_rows
        row = self.per_token * (fullest + ROW_OVERHEAD_TOKENS) + self.beside_tokens / num_rows
        return passes * row


def _even_load(total: int, largest: int, num_rows: int) -> int:
    """Tokens of the fullest row if all were equally full, but for one that holds the largest part."""
    return max(math.ceil(total / num_rows), largest) if total else 0


def _load(row: Sequence[int], tokens: Sequence[int]) -> int:
    return sum(tokens[p] for p in row)


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
    fullest = max(_load(row, tokens) for row in rows)
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
    pipeline: Pipeline = NO_PIPELINE,
) -> None:
    """Assert every invariant of the module's docstring."""
    assert len(plan.rows) == data_parallel, "not one list of rows per data-parallel rank"
    lengths = {len(rank_rows) for rank_rows in plan.rows}
    assert len(lengths) == 1, f"ranks have different numbers of rows, {sorted(lengths)}"
    assert plan.rows_per_rank >= 1, "ranks have no row"
    multiple = pipeline.rows_multiple
    assert plan.rows_per_rank % multiple == 0, (
        f"{plan.rows_per_rank} rows per rank are not a multiple of {multiple}"
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
    _check_first_pass(plan, multiple)

    filled = [
        [
            sum(groups[part.group].part(part.responses).row_tokens(shared_prompt) for part in row)
            for row in rank_rows
        ]
        for rank_rows in plan.rows
    ]
    fullest = max(max(of_rank) for of_rank in filled)
    assert fullest <= max_tokens, f"a row of {fullest} tokens is above the budget of {max_tokens}"
    if pipeline.stages > 1:
        filled = [[fullest] * len(of_rank) for of_rank in filled]
    least = tuple(tuple(max(alignment, _round_up(used, alignment)) for used in of_rank) for of_rank in filled)
    assert plan.row_lengths == least, (
        f"row lengths are {plan.row_lengths}, but the least that fit are {least}"
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
