"""Read and write the files of a Hugging Face model folder."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mpo_megatron.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The folder of a Megatron checkpoint with everything of the Hugging Face model but its weights.
HF_FOLDER = "hf"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.index.json")
# safetensors' names of the dtypes that weights are read from.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it; `dtype` is safetensors' name."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def model_folder(path: str | Path) -> Path:
    """Where a model's config, tokenizer and chat template are.

    Args:
        path: a Hugging Face folder: that itself; a Megatron checkpoint of this package: its `hf` folder.

    Raises:
        ConfigError: it is neither.
    """
    folder = Path(path)
    for candidate in (folder, folder / HF_FOLDER):
        if (candidate / "config.json").is_file():
            return candidate
    steps = sorted(folder.glob(f"**/step_*/{HF_FOLDER}/config.json"))
    inside = (
        f"but holds some: give one, such as {steps[-1].parents[1]}"
        if steps
        else f"(it has no {HF_FOLDER}/config.json)"
    )
    raise ConfigError(
        f"{folder.absolute()} is neither a Hugging Face folder (it has no config.json) nor a Megatron checkpoint "
        + inside
    )


def is_checkpoint(path: str | Path) -> bool:
    """Whether a model is a Megatron checkpoint, and not a Hugging Face folder; see `model_folder`."""
    return model_folder(path) != Path(path)


class WeightReader:
    """The tensors of a folder's safetensors files. All headers are read at once, values when they are asked for.

    Of the single file and the index, where both are there, the single file counts, as in transformers.

    Raises:
        CheckpointError: there are no safetensors files, the index is broken, a file is missing, cut short or not
            readable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tensors = self._header(SINGLE) if (self.folder / SINGLE).is_file() else self._indexed()

    def _header(self, file: str) -> dict[str, StoredTensor]:
        """The tensors of one file by name."""
        handle = self._open(file)
        names = handle.keys()
        slices = {name: handle.get_slice(name) for name in names}
        return {
            name: StoredTensor(file, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()
        }

    def _indexed(self) -> dict[str, StoredTensor]:
        """The tensors that the index names."""
        weight_map = self._weight_map()
        headers = {file: self._header(file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.folder / file} has no tensor {name!r}, though {INDEX} says that it is there; the index and "
                    "the shards are of different models, so copy or download all of them again"
                )
        return {name: headers[file][name] for name, file in weight_map.items()}

    def _weight_map(self) -> dict[str, str]:
        """The index: tensor name to file name."""
        path = self.folder / INDEX
        if not path.is_file():
            others = sorted(other.name for other in self.folder.glob("pytorch_model*.bin"))
            found = f"only {', '.join(others)}" if others else f"neither {SINGLE} nor {INDEX}"
            raise CheckpointError(
                f"{self.folder} holds {found}; weights are read from safetensors files, which save_pretrained of "
                "transformers writes: load the model there and save it"
            )
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): PurePosixPath(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as an index ({error}), which is JSON with a weight_map from tensor names to "
                "file names; copy or download it again"
            ) from error
        for file in sorted(set(files.values())):
            if file.is_absolute() or ".." in file.parts:
                raise CheckpointError(
                    f"{path} names {file}, which is outside the folder; copy the shard into the folder and name that"
                )
            if not _is_file(self.folder / file):
                raise CheckpointError(
                    f"{self.folder / file} is missing, though {INDEX} names it; copy or download the shard"
                )
        return {name: str(file) for name, file in files.items()}

    def _open(self, file: str) -> Any:
        """Map a file; safetensors compares its length with its header."""
        try:
            return safe_open(self.folder / file, framework="pt")
        # RuntimeError: torch maps a file that safetensors has opened, and does not find it any more.
        except (SafetensorError, OSError, RuntimeError) as error:
            if _is_lfs_pointer(self.folder / file):
                raise CheckpointError(
                    f"{self.folder / file} is a Git LFS pointer, not the weights; run: git lfs pull"
                ) from error
            raise CheckpointError(
                f"{self.folder / file} cannot be read as safetensors ({error}); copy or download it again"
            ) from error

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def stored(self, name: str) -> StoredTensor:
        """What the header of its file says of a tensor."""
        return self._tensors[name]

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that the tensors of these names are there, of these shapes, and hold plain floating-point numbers.

        Raises:
            CheckpointError: a tensor is not there, of another shape, or quantised.
        """
        for name, shape in shapes.items():
            stored = self._tensors.get(name)
            if stored is None:
                raise CheckpointError(
                    f"{self.folder} has no tensor {name!r}, which the model's config.json asks for; config.json and "
                    "the weights do not belong together"
                )
            if stored.dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.folder / stored.file}: {name} is stored as {stored.dtype}; training starts from float32, "
                    "bfloat16 or float16 weights, so dequantise the model first"
                )
            if stored.shape != tuple(shape):
                raise CheckpointError(
                    f"{self.folder / stored.file}: {name} has the shape {stored.shape}, and by config.json "
                    f"{tuple(shape)}; config.json and the weights do not belong together"
                )

    def slices(self, names: Sequence[str]) -> list[Any]:
        """These tensors as safetensors slices: index one to read it.

        The files are mapped as long as the slices live. Opening one takes less than a millisecond, and the pages of a
        file that stays open would count as this process's memory, whatever has been read from it.
        """
        handles = {file: self._open(file) for file in {self._tensors[name].file for name in names}}
        return [handles[self._tensors[name].file].get_slice(name) for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    # No file has such a name.
    except (OSError, ValueError):
        return False


def _is_lfs_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS has left a pointer in the place of the file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(23) == b"version https://git-lfs"


def copy_all_but_weights(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy config, generation config, tokenizer and chat template; config.json names the weights' new dtype."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _matches(path, WEIGHT_PATTERNS):
            shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(path.match(pattern) for pattern in patterns)
