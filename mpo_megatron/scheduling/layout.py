"""Where the prompts and responses of a row lie. Pure arithmetic: no torch, no ranks.

A **row** is one packed sequence of T tokens. It is a list of **blocks**, each a prompt followed by responses that
continue it::

    | prompt A | response A1 | response A2 | response A3 | prompt B | response B1 | ... | padding |

With shared prompts a group is one block. Without, it is one block per response, each with the prompt repeated: the same
code, for comparison. A response's positions go on where the prompt's end, whichever place it has in the row.

Attention sees a row as **segments**: the tokens of a prompt look at the prompt up to themselves, those of a response at
[its prompt | the response up to themselves]. Under context parallelism each rank holds some spans of the row, and a
segment is what a rank holds of a prompt or response: the layout is cut, never a dense mask.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """`length` consecutive tokens of a row, from `start`."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Block:
    """One prompt and the responses that continue it."""

    prompt: Span
    responses: tuple[Span, ...]


@dataclass(frozen=True)
class GroupLengths:
    """Token counts of a group: its prompt and each of its responses."""

    prompt: int
    responses: tuple[int, ...]

    def part(self, responses: Iterable[int]) -> "GroupLengths":
        """The prompt with some of the responses, by their positions in the group."""
        return GroupLengths(self.prompt, tuple(self.responses[i] for i in responses))

    def row_tokens(self, shared_prompt: bool) -> int:
        """Tokens that the group takes in a row."""
        prompts = 1 if shared_prompt else len(self.responses)
        return prompts * self.prompt + sum(self.responses)

    def attention_pairs(self, shared_prompt: bool) -> int:
        """Query-key pairs that causal attention looks at: P(P+1)/2 per stored prompt, PR + R(R+1)/2 per response."""
        prompts = 1 if shared_prompt else len(self.responses)
        within = prompts * self.prompt * (self.prompt + 1) // 2
        return within + sum(self.prompt * r + r * (r + 1) // 2 for r in self.responses)


def lay_out(groups: Sequence[GroupLengths], shared_prompt: bool) -> tuple[Block, ...]:
    """The blocks of a row that holds these groups one after the other, without gaps, in order."""
    blocks: list[Block] = []
    cursor = 0
    for group in groups:
        bunches = [group.responses] if shared_prompt else [(length,) for length in group.responses]
        for bunch in bunches:
            prompt = Span(cursor, group.prompt)
            cursor = prompt.stop
            responses = []
            for length in bunch:
                responses.append(Span(cursor, length))
                cursor += length
            blocks.append(Block(prompt, tuple(responses)))
    return tuple(blocks)


@dataclass(frozen=True)
class Segment:
    """Consecutive query tokens of one prompt or response, and what they attend to: causal, aligned bottom-right.

    The last query sees all keys, the one before it all but the last, and so on.

    Attributes:
        queries: where they lie among the tokens that this context-parallel rank holds.
        keys: where they lie in the row: of a response (its prompt, the response up to the last query), of a prompt
            (the prompt up to the last query,).
    """

    queries: Span
    keys: tuple[Span, ...]

    @property
    def num_keys(self) -> int:
        return sum(span.length for span in self.keys)

    @property
    def attention_pairs(self) -> int:
        """Query-key pairs that the mask leaves: of q queries the last sees all k keys, the first k - q + 1."""
        queries = self.queries.length
        return queries * self.num_keys - queries * (queries - 1) // 2


def context_spans(row_tokens: int, size: int, rank: int) -> tuple[Span, ...]:
    """What context-parallel rank `rank` of `size` holds of a row, in the row's order.

    A row of causal attention costs more towards its end, so it is cut into 2 * size equal chunks and rank r holds
    chunks r and 2 * size - 1 - r, as everywhere in Megatron. One rank holds the row in one span.
    """
    if size == 1:
        return (Span(0, row_tokens),)
    chunk, rest = divmod(row_tokens, 2 * size)
    assert rest == 0, f"a row of {row_tokens} tokens cannot be cut into {2 * size} equal chunks"
    return Span(rank * chunk, chunk), Span((2 * size - 1 - rank) * chunk, chunk)


def cut_segments(blocks: Sequence[Block], held: Sequence[Span]) -> tuple[Segment, ...]:
    """The segments of the tokens in `held` (ascending), one after the other without gaps; padding is in none."""
    segments: list[Segment] = []
    offset = 0  # of the span among the held tokens
    for span in held:
        for block in blocks:
            pieces = [(block.prompt, ()), *((response, (block.prompt,)) for response in block.responses)]
            for own, before in pieces:
                start, stop = max(own.start, span.start), min(own.stop, span.stop)
                if start < stop:
                    queries = Span(offset + start - span.start, stop - start)
                    segments.append(Segment(queries, (*before, Span(own.start, stop - own.start))))
        offset += span.length
    return tuple(segments)


# Tokens of padding that look at each other: as many as a tile of an attention kernel has.
PADDING_SEGMENT = 128


def padding_segments(blocks: Sequence[Block], held: Sequence[Span]) -> tuple[Segment, ...]:
    """Segments of the held padding, for kernels to which every token is some segment's.

    Nobody reads what padding attends to, so it attends to itself, and little of it at a time.
    """
    end = blocks[-1].responses[-1].stop if blocks else 0
    segments: list[Segment] = []
    offset = 0
    for span in held:
        for start in range(max(span.start, end), span.stop, PADDING_SEGMENT):
            length = min(PADDING_SEGMENT, span.stop - start)
            segments.append(Segment(Span(offset + start - span.start, length), (Span(start, length),)))
        offset += span.length
    return tuple(segments)
