"""Groups of scored responses: `build_dataset` reads, checks, tokenises, caches and selects them."""

from mpo_megatron.data.cache import DataReport
from mpo_megatron.data.dataset import TokenCache, build_dataset
from mpo_megatron.data.groups import GroupList, Groups, TokenizedGroup
from mpo_megatron.data.partition import PARTITIONS, partition_by_mean, preferred_mask
from mpo_megatron.data.readers import read_groups, read_records
from mpo_megatron.data.schema import DataError, Message, ScoredGroup, ScoredResponse, group_from_record
from mpo_megatron.data.selection import GroupDataset, Selection
from mpo_megatron.data.tokenize import GroupTokenizer, GroupTokens, TokenizeOptions

__all__ = [
    "PARTITIONS",
    "DataError",
    "DataReport",
    "GroupDataset",
    "GroupList",
    "GroupTokenizer",
    "GroupTokens",
    "Groups",
    "Message",
    "ScoredGroup",
    "ScoredResponse",
    "Selection",
    "TokenCache",
    "TokenizeOptions",
    "TokenizedGroup",
    "build_dataset",
    "group_from_record",
    "partition_by_mean",
    "preferred_mask",
    "read_groups",
    "read_records",
]
