"""Where the prompts and responses of a row lie. Pure arithmetic: no torch, no ranks.

A **row** is one packed sequence of T tokens. It is a list of **blocks**, each a prompt followed by responses that
continue it::

    | prompt A | response A1 | response A2 | response A3 | prompt B | response B1 | ... | padding |

With shared prompts a group is one block. Without, it is one block per response, each with the prompt repeated: the same
code, for comparison. A response's positions go on where the prompt's end, whichever place it has in the row.
"""

from collections.abc import Sequence
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
