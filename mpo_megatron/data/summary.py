"""What a data source holds, before a run: its groups in figures, and every record that is at fault."""

import hashlib
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
from mpo_megatron.data.selection import Selection, noise
from mpo_megatron.data.tokenize import GroupTokenizer
from mpo_megatron.data.within import LengthsByScore, Spacing, length_by_place, lengths_by_score, spacing

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
        scores: [R], those of the data, without noise.
        gaps: differences between neighbouring scores of a group, ascending order within it.
        is_preferred: [R] whether the selection prefers a response; noise on the scores is part of the selection.
        is_dispreferred: [R] whether it keeps it and does not prefer it.
        cut_responses: above max_length.
        repeated: [G] responses with the text of an earlier one of their group.
        prompts: [G] digests of the prompts.
    """

    prompt_lengths: NDArray[np.int64]
    response_lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    scores: NDArray[np.float64]
    gaps: NDArray[np.float64]
    is_preferred: NDArray[np.bool_]
    is_dispreferred: NDArray[np.bool_]
    cut_responses: int
    repeated: NDArray[np.int64]
    prompts: list[bytes]

    @property
    def preferred(self) -> NDArray[np.int64]:
        """[G] responses that the selection prefers."""
        return self._count(self.is_preferred)

    @property
    def dispreferred(self) -> NDArray[np.int64]:
        """[G] those that it keeps and does not prefer."""
        return self._count(self.is_dispreferred)

    def _count(self, which: NDArray[np.bool_]) -> NDArray[np.int64]:
        group = np.repeat(np.arange(self.sizes.size), self.sizes)
        return np.bincount(group[which], minlength=self.sizes.size)

    def spacing(self) -> list[Spacing]:
        """How far scores are apart, by responses of a group."""
        return spacing(self.sizes, self.scores)

    def lengths_by_score(self) -> LengthsByScore | None:
        """How lengths go with scores; None where no group has both preferred and dispreferred responses."""
        lengths = self.response_lengths.astype(np.float64)
        return lengths_by_score(self.sizes, self.scores, lengths, self.is_preferred, self.is_dispreferred)

    def length_by_place(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """([K], [K]): see `within.length_by_place`."""
        return length_by_place(self.sizes, self.scores, self.response_lengths.astype(np.float64))

    @property
    def repeated_prompts(self) -> int:
        """Groups whose prompt an earlier group has."""
        return len(self.prompts) - len(set(self.prompts))

    def prompts_shared_with(self, other: "Summary") -> int:
        """Groups whose prompt another data source has, too."""
        theirs = set(other.prompts)
        return sum(prompt in theirs for prompt in self.prompts)

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
    prompts: list[bytes] = []
    prompt_lengths: list[int] = []
    response_lengths: list[int] = []
    groups: list[NDArray[np.float64]] = []
    masks: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = []
    repeated: list[int] = []
    cut = 0
    source = with_progress(read_groups(path, on_fault=on_fault), f"Reading {path}")
    for group, prompt, lengths, cuts in _lengths(source, tokenizer, on_fault):
        scores = np.array([response.score for response in group.responses], dtype=np.float64)
        prompts.append(_digest(group))
        prompt_lengths.append(prompt)
        response_lengths.extend(lengths)
        groups.append(scores)
        masks.append(_sets(selection, group.id, scores))
        repeated.append(scores.size - len({response.text.strip() for response in group.responses}))
        cut += cuts
    nothing, nobody = [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
    return Summary(
        prompt_lengths=np.array(prompt_lengths, dtype=np.int64),
        response_lengths=np.array(response_lengths, dtype=np.int64),
        sizes=np.array([scores.size for scores in groups], dtype=np.int64),
        scores=np.concatenate([*groups, *nothing]),
        gaps=np.concatenate([*(np.diff(np.sort(scores)) for scores in groups), *nothing]),
        is_preferred=np.concatenate([*(preferred for preferred, _ in masks), *nobody]),
        is_dispreferred=np.concatenate([*(dispreferred for _, dispreferred in masks), *nobody]),
        cut_responses=cut,
        repeated=np.array(repeated, dtype=np.int64),
        prompts=prompts,
    )


def _digest(group: ScoredGroup) -> bytes:
    """Of the prompt's turns."""
    digest = hashlib.blake2b(digest_size=16)
    for message in group.messages:
        for text in (message.role, message.content.strip()):
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def _sets(
    selection: Selection, name: str, scores: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """([n] which responses of a group are preferred, [n] which are kept and dispreferred), as a run has them."""
    if selection.score_noise:
        scores = scores + noise(selection.score_noise, selection.score_noise_seed, name, scores.size)
    (kept,), (mask,) = selection(scores[None])
    preferred, dispreferred = np.zeros((2, scores.size), dtype=np.bool_)
    preferred[kept], dispreferred[kept] = mask, ~mask
    return preferred, dispreferred


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
