"""A step's rows as numbers: what the scheduler makes of groups' lengths, without their tokens.

The plan is the run's own (`scheduling.plan.plan_step`), and so are layout and segments (`scheduling.layout`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mpo_megatron.errors import ConfigError
from mpo_megatron.planning.run import Run
from mpo_megatron.scheduling.layout import GroupLengths, Span, context_spans, cut_segments, lay_out
from mpo_megatron.scheduling.plan import CostModel, StepPlan, plan_step


@dataclass(frozen=True)
class RowShape:
    """What a context-parallel rank holds of a row, in numbers that memory and FLOPs follow from.

    Attributes:
        row_tokens: T.
        tokens: t, those that the rank holds, padding included.
        used: held tokens that are not padding.
        predicted: N response tokens that the rank predicts.
        responses: R.
        pairs: query-key pairs of attention, as the mask leaves them.
        keys: keys of all segments, each prompt's counted for every response that reads it.
        masked: queries times keys of the segments for which sdpa needs a mask.
    """

    row_tokens: int
    tokens: int
    used: int
    predicted: int
    responses: int
    pairs: int
    keys: int
    masked: int

    @classmethod
    def of(
        cls, groups: Sequence[GroupLengths], row_tokens: int, shared_prompt: bool, context: tuple[int, int]
    ) -> "RowShape":
        """Of a row that holds these groups; `context` is (context-parallel size, the rank's place)."""
        blocks = lay_out(groups, shared_prompt)
        held = context_spans(row_tokens, *context)
        segments = cut_segments(blocks, held)
        # A response's first token is predicted by the prompt's last one, the others by the token before them.
        predicting = [
            span
            for block in blocks
            for response in block.responses
            for span in (Span(block.prompt.stop - 1, 1), Span(response.start, response.length - 1))
        ]
        return cls(
            row_tokens=row_tokens,
            tokens=sum(span.length for span in held),
            used=sum(s.queries.length for s in segments),
            predicted=sum(_overlap(span, own) for span in predicting for own in held),
            responses=sum(len(block.responses) for block in blocks),
            pairs=sum(s.attention_pairs for s in segments),
            keys=sum(s.num_keys for s in segments),
            masked=sum(s.queries.length * s.num_keys for s in segments if s.queries.length < s.num_keys),
        )


# Groups of the same lengths, as in plans for given lengths, make the same rows over and over.
_row_shape = lru_cache(maxsize=4096)(RowShape.of)


def _overlap(a: Span, b: Span) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


@dataclass(frozen=True)
class StepShape:
    """The rows of a step.

    Attributes:
        rows: `rows[d][k][c]` is what context-parallel rank c holds of row k of data-parallel rank d.
        first_pass: rows of each rank that run forward only before.
        groups: lengths of the step's groups.
    """

    rows: tuple[tuple[tuple[RowShape, ...], ...], ...]
    first_pass: int
    groups: tuple[GroupLengths, ...]

    @property
    def rows_per_rank(self) -> int:
        return len(self.rows[0])

    @cached_property
    def counted(self) -> tuple[Counter[tuple[tuple[RowShape, ...], bool]], ...]:
        """Of each data-parallel rank: how often it has a row, and whether the row runs forward only before."""
        return tuple(Counter((row, k < self.first_pass) for k, row in enumerate(rank)) for rank in self.rows)

    @cached_property
    def largest(self) -> RowShape:
        """No row of the step is above it in any number: what memory is planned for."""
        every = [row for rank in self.rows for context in rank for row in context]
        return RowShape(*(max(getattr(row, name) for row in every) for name in RowShape.__dataclass_fields__))

    @property
    def fill(self) -> float:
        """The part of the row tokens that is not padding."""
        held = [row for rank in self.rows for context in rank for row in context]
        return sum(row.used for row in held) / sum(row.tokens for row in held)


def plan_rows(groups: Sequence[GroupLengths], run: Run, cost: CostModel) -> StepShape:
    """The rows of a step of these groups.

    Raises:
        ConfigError: a prompt with one of its responses is above the token budget.
    """
    plan = plan_step(
        groups,
        max_tokens=run.max_tokens,
        data_parallel=run.dp,
        cost=cost,
        alignment=run.alignment,
        shared_prompt=run.shared_prompt,
        pipeline=run.pipeline,
    )
    return step_shape(plan, groups, run)


def step_shape(plan: StepPlan, groups: Sequence[GroupLengths], run: Run) -> StepShape:
    """The rows of a plan of these groups."""
    rows = tuple(
        tuple(
            tuple(
                _row_shape(
                    tuple(groups[part.group].part(part.responses) for part in row),
                    length,
                    run.shared_prompt,
                    (run.cp, rank),
                )
                for rank in range(run.cp)
            )
            for row, length in zip(of_rank, lengths, strict=True)
        )
        for of_rank, lengths in zip(plan.rows, plan.row_lengths, strict=True)
    )
    return StepShape(rows, len(plan.rows[0]) if run.two_passes else plan.first_pass, tuple(groups))


def even_groups(prompt: int, responses: Sequence[int], n: int, batch: int) -> list[GroupLengths]:
    """A global batch of equal groups: a prompt and n responses, whose lengths are gone through in turn.

    Raises:
        ConfigError: a length or a number is below 1.
    """
    for name, value in (
        ("prompt", prompt),
        ("n", n),
        ("batch", batch),
        ("response", min(responses, default=0)),
    ):
        if value < 1:
            raise ConfigError(f"{name}={value} must be 1 or more")
    return [GroupLengths(prompt, tuple(responses[k % len(responses)] for k in range(n)))] * batch
