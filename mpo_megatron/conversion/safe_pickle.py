"""The index of a torch distributed checkpoint, which is a pickle, read without running what else a pickle may hold."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

# What torch and Megatron write; to make one of them does nothing else.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}


class NotAllowed(pickle.UnpicklingError):
    """The pickle asks for something that no index of a checkpoint has."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise NotAllowed(f"it asks for {module}.{name}, which could run any code")
        return super().find_class(module, name)


def read_index(path: Path) -> Metadata:
    """The index at `path`.

    Raises:
        NotAllowed: it has what no index has; nothing of that was run.
        OSError, pickle.UnpicklingError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            found = _Restricted(file).load()
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # a damaged pickle raises what it likes
            raise pickle.UnpicklingError(str(error)) from error
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"it is a {type(found).__name__}, and no index")
    return found
