"""What a data source holds, before a run: its groups in figures, and every record that is at fault."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_megatron.data.cache import with_progress
from mpo_megatron.data.faults import OnFault
from mpo_megatron.data.readers import read_groups
from mpo_megatron.data.schema import RecordError, ScoredGroup
from mpo_megatron.data.selection import Selection
from mpo_megatron.data.tokenize import GroupTokenizer

_BATCH_GROUPS = 512
_EXAMPLES = 3
# Columns of a table of figures, as quantiles.
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


@dataclass
class FaultCount:
    """An `OnFault` that ends nothing: it counts all faults, and leaves out what cannot be trained on.

    Args:
        kept: faults of groups that stay in the figures.

    Attributes:
        counts: by fault, records.
        examples: the first of each fault.
    """

    kept: frozenset[str]
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[RecordError]] = field(default_factory=dict)

    def __call__(self, error: RecordError) -> bool:
        self.counts[error.fault] += 1
        found = self.examples.setdefault(error.fault, [])
        if len(found) < _EXAMPLES:
            found.append(error)
        return error.fault not in self.kept


@dataclass(frozen=True)
class Summary:
    """Figures of the groups that can be trained on.

    Attributes:
        prompt_lengths: [G] in tokens, or in characters where there is no tokenizer; as trained on, so cut.
        response_lengths: [R] likewise, of all responses.
        sizes: [G] responses.
        scores: [R].
        gaps: differences between neighbouring scores of a group, ascending order within it.
        preferred: [G] responses that the selection prefers.
        dispreferred: [G] those that it keeps and does not prefer.
        cut_responses: above max_length.
    """

    prompt_lengths: NDArray[np.int64]
    response_lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    scores: NDArray[np.float64]
    gaps: NDArray[np.float64]
    preferred: NDArray[np.int64]
    dispreferred: NDArray[np.int64]
    cut_responses: int

    def distributions(self) -> dict[str, NDArray[np.float64]]:
        """What the summary has a distribution of, by name."""
        named = {
            "prompt length": self.prompt_lengths,
            "response length": self.response_lengths,
            "responses of a group": self.sizes,
            "score": self.scores,
            "gap between neighbouring scores": self.gaps,
            "preferred of a group": self.preferred,
            "dispreferred of a group": self.dispreferred,
        }
        return {name: values.astype(np.float64) for name, values in named.items()}

    def table(self) -> dict[str, dict[str, float]]:
        """By name of `distributions` its quantiles and its mean; empty without groups."""
        return {
            name: {label: float(np.quantile(values, q)) for label, q in QUANTILES.items()}
            | {"mean": float(values.mean())}
            for name, values in self.distributions().items()
            if values.size
        }


def summarise(
    path: str | Path,
    selection: Selection,
    tokenizer: GroupTokenizer | None,
    on_fault: OnFault,
) -> Summary:
    """Read a data source, tokenise it where there is a tokenizer, and take its figures; no tokens are kept.

    Raises:
        DataError: the source cannot be read, or what `on_fault` raises.
    """
    prompts: list[int] = []
    responses: list[int] = []
    groups: list[NDArray[np.float64]] = []
    preferred: list[int] = []
    dispreferred: list[int] = []
    cut = 0
    source = with_progress(read_groups(path, on_fault=on_fault), f"Reading {path}")
    for group, prompt, lengths, cuts in _lengths(source, tokenizer, on_fault):
        scores = np.array([response.score for response in group.responses], dtype=np.float64)
        kept, mask = selection(scores[None])
        prompts.append(prompt)
        responses.extend(lengths)
        groups.append(scores)
        preferred.append(int(mask.sum()))
        dispreferred.append(kept.size - int(mask.sum()))
        cut += cuts
    nothing = [np.zeros(0)]
    return Summary(
        prompt_lengths=np.array(prompts, dtype=np.int64),
        response_lengths=np.array(responses, dtype=np.int64),
        sizes=np.array([scores.size for scores in groups], dtype=np.int64),
        scores=np.concatenate([*groups, *nothing]),
        gaps=np.concatenate([*(np.diff(np.sort(scores)) for scores in groups), *nothing]),
        preferred=np.array(preferred, dtype=np.int64),
        dispreferred=np.array(dispreferred, dtype=np.int64),
        cut_responses=cut,
    )


def _lengths(
    groups: Iterable[ScoredGroup], tokenizer: GroupTokenizer | None, on_fault: OnFault
) -> Iterator[tuple[ScoredGroup, int, list[int], int]]:
    """(group, length of its prompt, lengths of its responses, how many of them are cut)."""
    groups = iter(groups)
    while batch := list(islice(groups, _BATCH_GROUPS)):
        if tokenizer is None:
            for group in batch:
                prompt = sum(len(message.content) for message in group.messages)
                yield group, prompt, [len(response.text) for response in group.responses], 0
            continue
        for group, tokens in zip(batch, tokenizer(batch, on_fault), strict=True):
            if tokens is not None:
                lengths = [len(ids) for ids in tokens.response_ids]
                yield group, len(tokens.prompt_ids), lengths, tokens.responses_truncated
