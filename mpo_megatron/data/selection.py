"""Which responses of a group are trained on, with which scores, and which of them are preferred.

A cache holds the tokens and scores of all responses; a selection is a view of it, made anew at each start, so that
changing it tokenises nothing. In order: noise on the scores, the first responses, the best and worst of these, the
preferred ones among them; groups without a preferred one are left out.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpo_megatron.data.groups import TokenizedGroup
from mpo_megatron.data.partition import Mask, Scores, get_partition, ranks
from mpo_megatron.data.schema import DataError
from mpo_megatron.errors import ConfigError

if TYPE_CHECKING:
    from mpo_megatron.data.dataset import TokenCache


@dataclass(frozen=True)
class Selection:
    """How responses are selected and preferred.

    Attributes:
        partition: a name in `PARTITIONS`; mean, deviation and all else are taken over the responses that are kept.
        keep_first: train on so many of a group's responses, the first in the data; a group that has no more is kept
            whole. None: on all.
        keep_best: train on so many of a group's highest scores and so many of its lowest (`keep_worst`), in the data's
            order; a group that has no more is kept whole. None, both: on all. Of equal scores the first counts as the
            higher.
        score_noise: standard deviation of Gaussian noise that is added to every score first, in units of score (paper
            Table 8). Selection, partition and objective see the noisy scores.
        score_noise_seed: of the noise, which depends on it and on a group's id alone: not on order or layout.
        needs_preferred: whether groups without a preferred response are left out (paper section 4.4).

    Raises:
        ConfigError: an unknown partition, or values that do not go together.
    """

    partition: str = "mean"
    keep_first: int | None = None
    keep_best: int | None = None
    keep_worst: int | None = None
    score_noise: float = 0.0
    score_noise_seed: int = 0
    needs_preferred: bool = True

    def __post_init__(self) -> None:
        get_partition(self.partition)
        if self.keep_first is not None and self.keep_first < 2:
            raise ConfigError(
                f"keep_first={self.keep_first} must be 2 or more: a group has at least two responses"
            )
        best, worst = self.keep_best, self.keep_worst
        if (best is None) != (worst is None):
            raise ConfigError(
                f"keep_best={best} and keep_worst={worst} go together; set both, or neither to keep all responses"
            )
        if best is not None and worst is not None and (best < 1 or worst < 1):
            raise ConfigError(f"keep_best={best} and keep_worst={worst} must be 1 or more")
        if self.partition == "selected" and best is None:
            raise ConfigError(
                "partition=selected prefers the responses of keep_best; set keep_best and keep_worst"
            )
        if not 0 <= self.score_noise < np.inf:
            raise ConfigError(f"score_noise={self.score_noise} must be 0 or more")

    def __call__(self, scores: Scores) -> tuple[NDArray[np.int64], Mask]:
        """Select among groups of one size.

        Args:
            scores: [G, n], noise included.

        Returns:
            ([G, m] places of the kept responses in their groups, ascending; [G, m] which of them are preferred).
        """
        scores = scores[:, : self.keep_first]
        size = scores.shape[1]
        kept = np.broadcast_to(np.arange(size), scores.shape)
        if (
            self.keep_best is not None
            and self.keep_worst is not None
            and self.keep_best + self.keep_worst < size
        ):
            place = ranks(scores)
            chosen = (place < self.keep_best) | (place >= size - self.keep_worst)
            kept = np.nonzero(chosen)[1].reshape(len(scores), -1)
        selected = np.take_along_axis(scores, kept, axis=1)
        return kept, get_partition(self.partition)(selected, self.keep_best)


def noise(sigma: float, seed: int, group_id: str, size: int) -> Scores:
    """[size] Gaussian noise for the scores of one group."""
    digest = hashlib.sha256(f"{seed}/{group_id}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return sigma * generator.standard_normal(size)


class GroupDataset:
    """The groups of a cache under a selection.

    Attributes:
        fingerprint: digest of the content (ids, tokens, scores, preferences, in order).
        report: what became of the data.
        skipped: the file that says which records were left out, and why, one a line.
        prompt_lengths: int64 [G] tokens of each prompt.
        response_offsets: int64 [G + 1]; group i has the responses numbered from [i] up to [i + 1].
        response_lengths: int64 [R] tokens of each response, by its number.
    """

    def __init__(self, base: "TokenCache", selection: Selection, where: str) -> None:
        """Select from all groups of the cache.

        Args:
            where: the data source, for errors.

        Raises:
            DataError: no group is left.
        """
        self._base = base
        self.skipped = base.skipped
        self._scores = base.scores
        sizes = np.diff(base.response_offsets)
        if selection.score_noise:
            drawn = [
                noise(selection.score_noise, selection.score_noise_seed, name, size)
                for name, size in zip(base.ids(), sizes, strict=True)
            ]
            self._scores = base.scores + np.concatenate(drawn)
        kept: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * len(sizes)
        preferred: list[Mask] = [np.zeros(0, dtype=np.bool_)] * len(sizes)
        for size in np.unique(sizes):  # groups of one size at a time, all at once
            members = np.flatnonzero(sizes == size)
            numbers = base.response_offsets[members][:, None] + np.arange(size)
            for index, places, mask in zip(members, *selection(self._scores[numbers]), strict=True):
                kept[index], preferred[index] = places, mask
        has_preferred = np.array([mask.any() for mask in preferred])
        self._groups = np.flatnonzero(has_preferred) if selection.needs_preferred else np.arange(len(sizes))
        self._kept = [kept[i] for i in self._groups]
        self._preferred = [preferred[i] for i in self._groups]
        self._set_lengths()
        settings = str(asdict(selection)) if selection != Selection() else ""
        self.fingerprint = hashlib.sha256(f"{base.fingerprint}{settings}".encode()).hexdigest()
        self.report = replace(
            base.report,
            groups_kept=len(self),
            skipped_no_preference=len(sizes) - len(self),
            kept_no_preference=len(self) - int(has_preferred[self._groups].sum()),
            responses=len(self.response_lengths),
            responses_dropped=int(sizes[self._groups].sum()) - len(self.response_lengths),
            prompt_tokens=int(self.prompt_lengths.sum()),
            response_tokens=int(self.response_lengths.sum()),
        )
        if not len(self):
            raise DataError(
                f"{where}: nothing is left to train on: {self.report}; give responses that differ in score, and "
                "prompts within max_prompt_length"
            )

    def _set_lengths(self) -> None:
        base = self._base
        numbers = [
            base.response_offsets[i] + places for i, places in zip(self._groups, self._kept, strict=True)
        ]
        self.prompt_lengths = base.prompt_lengths[self._groups]
        self.response_offsets = np.cumsum([0, *(len(places) for places in self._kept)], dtype=np.int64)
        self.response_lengths = base.response_lengths[np.concatenate([*numbers, np.zeros(0, dtype=np.int64)])]

    def __len__(self) -> int:
        return len(self._groups)

    def group(self, index: int) -> TokenizedGroup:
        """Group `index` of 0 .. G - 1, in arrays of the caller's own. Raises IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        number, places = int(self._groups[index]), self._kept[index]
        name, prompt_ids, response_ids = self._base.tokens(number)
        return TokenizedGroup(
            id=name,
            prompt_ids=prompt_ids,
            response_ids=[response_ids[k] for k in places],
            scores=self._scores[self._base.response_offsets[number] + places],
            preferred=self._preferred[index].copy(),
        )
