"""Tokenised groups on disk, memory-mapped: made once per node, read by all of its processes.

A cache is a folder `cache_dir/<key>` with

- groups.arrow: one row per group (`FEATURES`),
- prompt_lengths.npy [G], response_offsets.npy [G + 1], response_lengths.npy [R], for planning without tokens,
- scores.npy [R],
- skipped.jsonl: what records were left out for, one a line; as they were named when the cache was made,
- meta.json: the report and the fingerprint of the content.

The key covers everything that the content depends on. A cache is written beside its final name and renamed,
so one that exists is complete. G groups, R responses of all groups; response k of group i has number
response_offsets[i] + k.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock
from numpy.typing import NDArray

from mpo_megatron.config import FaultConfig
from mpo_megatron.data.cache import DataReport, cache_key, published, with_progress, write_cache
from mpo_megatron.data.faults import Faults
from mpo_megatron.data.readers import read_groups
from mpo_megatron.data.schema import DataError
from mpo_megatron.data.selection import GroupDataset, Selection
from mpo_megatron.data.tokenize import GroupTokenizer, TokenizeOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SKIPPED_FILE = "skipped.jsonl"


class TokenCache:
    """All groups of one cache; opening it reads lengths, scores and counts, `tokens` the tokens of one group.

    Attributes:
        fingerprint: digest of the content (ids, tokens, scores, in order).
        report: what became of the data when the cache was made.
        prompt_lengths: int64 [G] tokens of each prompt.
        response_offsets: int64 [G + 1]; group i has the responses numbered from [i] up to [i + 1].
        response_lengths: int64 [R] tokens of each response, by its number.
        scores: float64 [R].
        skipped: the file that says which records were left out, and why.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the cache in `folder`, as `build_dataset` left it."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = meta["fingerprint"]
        self.report = DataReport(**meta["report"])
        self.prompt_lengths: NDArray[np.int64] = np.load(folder / "prompt_lengths.npy")
        self.response_offsets: NDArray[np.int64] = np.load(folder / "response_offsets.npy")
        self.response_lengths: NDArray[np.int64] = np.load(folder / "response_lengths.npy")
        self.scores: NDArray[np.float64] = np.load(folder / "scores.npy")
        self.skipped = folder / SKIPPED_FILE
        self._rows = Dataset.from_file(str(folder / "groups.arrow")).with_format("arrow")
        assert len(self._rows) == len(self.prompt_lengths) == len(self.response_offsets) - 1

    def ids(self) -> list[str]:
        """The groups' ids, in order."""
        names: list[str] = self._rows.with_format(None)["id"][:]
        return names

    def tokens(self, index: int) -> tuple[str, NDArray[np.int64], list[NDArray[np.int64]]]:
        """(id, prompt tokens, tokens of each response) of a group, in arrays of the caller's own."""
        row = self._rows[index]  # a pyarrow table of one row: no detour over Python ints
        first, stop = self.response_offsets[index], self.response_offsets[index + 1]
        ends = np.cumsum(self.response_lengths[first:stop])[:-1]
        responses = np.split(_flat(pc.list_flatten(row["response_ids"])).astype(np.int64), ends)
        return row["id"][0].as_py(), _flat(row["prompt_ids"]).astype(np.int64), responses


def _flat(lists: pa.ChunkedArray) -> NDArray[Any]:
    """The elements of a column of lists, one list after another."""
    elements: NDArray[Any] = pc.list_flatten(lists).to_numpy()
    return elements


def build_dataset(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    options: TokenizeOptions,
    *,
    cache_dir: str | Path,
    selection: Selection | None = None,
    split: str | None = None,
    prompt_key: str | None = None,
    faults: FaultConfig | None = None,
) -> GroupDataset:
    """The tokenised groups of a data source: made here if no cache fits, else opened; then what is selected of them.

    Every process may call it: of those that share `cache_dir`, one does the work and the others wait for it.

    Args:
        path: the data source; see `read_records`, also for `split`.
        tokenizer: a Hugging Face tokenizer.
        options: lengths, truncation and template.
        cache_dir: folder of the caches; made if missing.
        selection: which responses are trained on, and which are preferred; None: all, by the mean.
        prompt_key: the key of the prompt in records; see `group_from_record`.
        faults: what becomes of records at fault; None: each ends the run.

    Raises:
        DataError: bad data, nothing that is kept, or a folder of caches that cannot be written.
        ConfigError: options that this tokenizer cannot meet.
    """
    cache_dir = Path(cache_dir).expanduser()
    policy = faults or FaultConfig()
    folder = cache_dir / cache_key(path, tokenizer, options, split, prompt_key, policy)
    try:
        if not folder.is_dir():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():  # else another process has made it while this one waited
                    group_tokenizer = GroupTokenizer(tokenizer, options)
                    with (
                        published(folder) as unfinished,
                        (unfinished / SKIPPED_FILE).open("w", encoding="utf-8") as report,
                    ):
                        on_fault = Faults(policy, report)
                        groups = with_progress(
                            read_groups(path, split, prompt_key, on_fault), f"Tokenising {path}"
                        )
                        write_cache(groups, group_tokenizer, unfinished, str(path), on_fault)
    except OSError as error:
        raise DataError(
            f"{cache_dir} cannot be written ({error.strerror or error}), and tokenised data go there; make room, or "
            "set model.data.cache_dir to another folder"
        ) from error
    return GroupDataset(TokenCache(folder), selection or Selection(), str(path))
