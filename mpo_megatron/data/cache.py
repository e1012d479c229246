"""Writing a cache of tokenised groups, and naming it after all that its content depends on; `dataset.py`
reads it."""

import dataclasses
import errno
import hashlib
import json
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from mpo_megatron.config import FaultConfig
from mpo_megatron.data.faults import FAULTS, Faults
from mpo_megatron.data.readers import content_digest
from mpo_megatron.data.schema import DataError, ScoredGroup
from mpo_megatron.data.tokenize import GroupTokenizer, TokenizeOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 3  # raise it when the same input gives other content
FEATURES = Features(
    {
        "id": Value("string"),
        "prompt_ids": Sequence(Value("int32")),
        "response_ids": Sequence(Sequence(Value("int32"))),
    }
)
_BATCH_GROUPS = 512  # per call of the tokenizer, and per record batch on disk
# In `DataReport`, what a record is skipped for.
_WHY = {
    "unreadable": "what is no JSON or no text",
    "shape": "their shape",
    "score": "a score that is none",
    "empty": "an empty prompt or response",
    "template": "messages that the chat template refuses",
    "duplicate_id": "the id of another",
    "unequal_scores": "equal responses with different scores",
    "equal_responses": "equal responses",
}
_GROUPS_WITHOUT_PROGRESS = 2000  # so few are done before a progress bar is read


@dataclasses.dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the data. Responses and tokens are those of the kept groups; what was cut is counted over all."""

    groups_read: int = 0
    groups_kept: int = 0
    skipped_no_preference: int = 0
    kept_no_preference: int = 0
    skipped_long_prompt: int = 0
    skipped_unreadable: int = 0
    skipped_shape: int = 0
    skipped_score: int = 0
    skipped_empty: int = 0
    skipped_template: int = 0
    skipped_duplicate_id: int = 0
    skipped_unequal_scores: int = 0
    skipped_equal_responses: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    border_merges: int = 0
    rewritten_by_template: int = 0
    responses: int = 0
    responses_dropped: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0

    def __str__(self) -> str:
        """One line for the log; what did not happen is left out."""
        counts = (
            (self.skipped_no_preference, "groups skipped for lack of a preferred response"),
            (self.kept_no_preference, "groups kept without a preferred response"),
            (self.skipped_long_prompt, "groups skipped for too long a prompt"),
            *(
                (getattr(self, f"skipped_{fault}"), f"records skipped for {why}")
                for fault, why in _WHY.items()
            ),
            (self.responses_dropped, "of their responses left out by keep_first, keep_best and keep_worst"),
            (self.truncated_prompts, "prompts cut on the left"),
            (self.truncated_responses, "responses cut at max_length"),
            (self.border_merges, "responses tokenised apart from their prompt"),
            (self.rewritten_by_template, "responses kept although the chat template rewrites them"),
        )
        line = (
            f"{self.groups_kept:,} of {self.groups_read:,} groups kept, {self.responses:,} responses, "
            f"{self.prompt_tokens:,} prompt and {self.response_tokens:,} response tokens"
        )
        return "; ".join([line, *(f"{count:,} {what}" for count, what in counts if count)])


def write_cache(
    groups: Iterable[ScoredGroup], tokenizer: GroupTokenizer, folder: Path, shown: str, faults: Faults
) -> None:
    """Tokenises and writes all groups, and what describes them, to `folder`.

    Args:
        faults: is told of groups at fault, and has been told of records that `groups` leaves out.

    Raises:
        DataError: bad data, or no group of `shown` (the data source, for the message) is kept.
    """
    counts = dict.fromkeys((field.name for field in dataclasses.fields(DataReport)), 0)
    prompt_lengths: list[int] = []
    response_lengths: list[int] = []
    response_offsets = [0]
    scores: list[float] = []
    digest = hashlib.sha256()
    groups = iter(groups)
    with ArrowWriter(path=str(folder / "groups.arrow"), features=FEATURES) as writer:
        while batch := list(islice(groups, _BATCH_GROUPS)):
            rows = list(_rows(batch, tokenizer, counts, faults))
            for row in rows:
                lengths = [len(ids) for ids in row["response_ids"]]
                prompt_lengths.append(len(row["prompt_ids"]))
                response_lengths.extend(lengths)
                response_offsets.append(len(response_lengths))
                scores.extend(row["scores"])
                _add_to_digest(digest, row, lengths)
            if rows:
                writer.write_batch({name: [row[name] for row in rows] for name in FEATURES})
        for fault in FAULTS:
            counts[f"skipped_{fault}"] = faults.left_out[fault]
        counts["groups_read"] = counts["groups_kept"] + faults.left_out.total()
        if not counts["groups_read"]:
            raise DataError(f"{shown} holds no groups; write at least one, or correct the path")
        if not prompt_lengths:
            raise DataError(
                f"{shown}: nothing is left to train on: {DataReport(**counts)}; mend the data, or give prompts "
                "within max_prompt_length"
            )
        writer.finalize()
    counts["responses"] = len(response_lengths)
    counts["prompt_tokens"], counts["response_tokens"] = sum(prompt_lengths), sum(response_lengths)
    for name, values in (
        ("prompt_lengths", prompt_lengths),
        ("response_lengths", response_lengths),
        ("response_offsets", response_offsets),
    ):
        np.save(folder / f"{name}.npy", np.array(values, dtype=np.int64))
    np.save(folder / "scores.npy", np.array(scores, dtype=np.float64))
    meta = {"fingerprint": digest.hexdigest(), "report": counts}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _rows(
    batch: list[ScoredGroup], tokenizer: GroupTokenizer, counts: dict[str, int], faults: Faults
) -> Iterator[dict[str, Any]]:
    """The groups of a batch as rows of `FEATURES`, with their scores; adds to `counts`, named as in DataReport."""
    for group, group_tokens in zip(batch, tokenizer(batch, faults), strict=True):
        if group_tokens is None:
            continue
        counts["groups_kept"] += 1
        counts["truncated_prompts"] += group_tokens.prompt_truncated
        counts["truncated_responses"] += group_tokens.responses_truncated
        counts["border_merges"] += group_tokens.border_merges
        counts["rewritten_by_template"] += group_tokens.rewritten_by_template
        yield {
            "id": group.id,
            "prompt_ids": np.array(group_tokens.prompt_ids, dtype=np.int32),
            "response_ids": [np.array(ids, dtype=np.int32) for ids in group_tokens.response_ids],
            "scores": np.array([response.score for response in group.responses], dtype=np.float64),
        }


def _add_to_digest(digest: "hashlib._Hash", row: dict[str, Any], response_lengths: list[int]) -> None:
    """Adds one row, with its lengths first, so that no two different rows give the same bytes."""
    name = row["id"].encode()
    lengths = [len(name), len(row["prompt_ids"]), len(response_lengths), *response_lengths]
    digest.update(np.array(lengths, dtype="<i8").tobytes() + name)
    for ids in (row["prompt_ids"], *row["response_ids"]):
        digest.update(ids.astype("<i4").tobytes())
    digest.update(row["scores"].astype("<f8").tobytes())


def with_progress(groups: Iterable[ScoredGroup], title: str) -> Iterable[ScoredGroup]:
    """The same groups, with a progress bar if there are many."""
    groups = iter(groups)
    head = list(islice(groups, _GROUPS_WITHOUT_PROGRESS + 1))
    few = len(head) <= _GROUPS_WITHOUT_PROGRESS
    return tqdm(chain(head, groups), desc=title, unit=" groups", mininterval=1, disable=few)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end and removed on an error. The caller holds the lock.

    Some network file systems keep a lock to one node. So each node fills a folder of its own, and of those that fill
    the same one the first gives it its name.
    """
    unfinished = folder.with_name(f"{folder.name}.{socket.gethostname()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def cache_key(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    options: TokenizeOptions,
    split: str | None,
    prompt_key: str | None,
    policy: FaultConfig,
) -> str:
    """Digest of all that the content of a cache depends on. DataError if there is no such data source."""
    parts = {
        "version": CACHE_VERSION,
        "data": content_digest(path),
        "split": split,
        "prompt_key": prompt_key,
        "options": dataclasses.asdict(options),
        "faults": dataclasses.asdict(policy),
        "tokenizer": _tokenizer_state(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_state(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What makes the tokenizer give the ids that it gives."""
    if tokenizer.is_fast:
        _, _, backend = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')
        assert backend, "before this stand truncation and padding, left by whoever used the tokenizer last"
    else:
        backend = f"{type(tokenizer).__qualname__} {sorted(tokenizer.get_vocab().items())}"
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"backend": backend, "special": special, "chat_template": tokenizer.chat_template}
