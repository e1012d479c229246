"""Tokenised groups on disk, memory-mapped: made once per node, read by all of its processes.

A cache is a folder `cache_dir/<key>` with

- groups.arrow: one row per kept group (`FEATURES`),
- prompt_lengths.npy [G], response_offsets.npy [G + 1], response_lengths.npy [R], for planning without tokens,
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

from mpo_megatron.data.cache import DataReport, cache_key, published, with_progress, write_cache
from mpo_megatron.data.groups import TokenizedGroup
from mpo_megatron.data.partition import get_partition
from mpo_megatron.data.readers import read_groups
from mpo_megatron.data.tokenize import GroupTokenizer, TokenizeOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GroupDataset:
    """The groups of one cache; opening it reads lengths and counts, `group` the tokens of one group.

    Attributes:
        fingerprint: digest of the content (ids, tokens, scores, preferences, in order).
        report: what became of the data when the cache was made.
        prompt_lengths: int64 [G] tokens of each prompt.
        response_offsets: int64 [G + 1]; group i has the responses numbered from [i] up to [i + 1].
        response_lengths: int64 [R] tokens of each response, by its number.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the cache in `folder`, as `build_dataset` left it."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = meta["fingerprint"]
        self.report = DataReport(**meta["report"])
        self.prompt_lengths: NDArray[np.int64] = np.load(folder / "prompt_lengths.npy")
        self.response_offsets: NDArray[np.int64] = np.load(folder / "response_offsets.npy")
        self.response_lengths: NDArray[np.int64] = np.load(folder / "response_lengths.npy")
        self._rows = Dataset.from_file(str(folder / "groups.arrow")).with_format("arrow")
        assert len(self._rows) == len(self.prompt_lengths) == len(self.response_offsets) - 1

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def group(self, index: int) -> TokenizedGroup:
        """Group `index` of 0 .. G - 1, in arrays of the caller's own. Raises IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        row = self._rows[index]  # a pyarrow table of one row: no detour over Python ints
        first, stop = self.response_offsets[index], self.response_offsets[index + 1]
        ends = np.cumsum(self.response_lengths[first:stop])[:-1]
        return TokenizedGroup(
            id=row["id"][0].as_py(),
            prompt_ids=_flat(row["prompt_ids"]).astype(np.int64),
            response_ids=np.split(_flat(pc.list_flatten(row["response_ids"])).astype(np.int64), ends),
            scores=_flat(row["scores"]).astype(np.float64),
            preferred=_flat(row["preferred"]).astype(np.bool_),
        )


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
    partition: str = "mean",
    split: str | None = None,
    prompt_key: str | None = None,
) -> GroupDataset:
    """The tokenised groups of a data source: made here if no cache fits, else opened.

    Every process may call it: of those that share `cache_dir`, one does the work and the others wait for it.
    Groups without a preferred response are left out (paper section 4.4) and counted in the report.

    Args:
        path: the data source; see `read_records`, also for `split`.
        tokenizer: a Hugging Face tokenizer.
        options: lengths, truncation and template.
        cache_dir: folder of the caches; made if missing.
        partition: how scores become preferences, a name in `PARTITIONS`.
        prompt_key: the key of the prompt in records; see `group_from_record`.

    Raises:
        DataError: bad data, or nothing that is kept.
        ConfigError: options that this tokenizer cannot meet, or an unknown partition.
    """
    get_partition(partition)
    cache_dir = Path(cache_dir).expanduser()
    folder = cache_dir / cache_key(path, tokenizer, options, partition, split, prompt_key)
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # else another process has made it while this one waited
                group_tokenizer = GroupTokenizer(tokenizer, options)
                groups = with_progress(read_groups(path, split, prompt_key), f"Tokenising {path}")
                with published(folder) as unfinished:
                    write_cache(groups, group_tokenizer, partition, unfinished, str(path))
    return GroupDataset(folder)
