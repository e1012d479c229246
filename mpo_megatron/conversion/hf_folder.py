"""Read and write the files of a Hugging Face model folder."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mpo_megatron.conversion.names import Entry
from mpo_megatron.errors import CheckpointError, ConfigError
from mpo_megatron.model.architecture import Architecture

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The folder of a Megatron checkpoint with everything of the Hugging Face model but its weights.
HF_FOLDER = "hf"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.index.json")


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


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
        ConfigError: transformers cannot make one of its files.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {folder} ({' '.join(str(error).split())[:200]}); put tokenizer.json and "
            "tokenizer_config.json there"
        ) from error


class WeightReader:
    """The tensors of a folder's safetensors files by name, read when they are indexed.

    Raises:
        CheckpointError: there are no safetensors files, a shard is missing or unreadable, a tensor is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self._files = self._find()

    def _find(self) -> dict[str, str]:
        """Tensor name to file name."""
        index = self.folder / INDEX
        if index.is_file():
            found: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for file in sorted(set(found.values())):
                if not (self.folder / file).is_file():
                    raise CheckpointError(
                        f"{self.folder / file} is missing, though {INDEX} names it; copy the shard there"
                    )
            return found
        if not (self.folder / SINGLE).is_file():
            raise CheckpointError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; save the model with "
                "save_pretrained(..., safe_serialization=True)"
            )
        return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self.folder / file} cannot be read ({error}); copy or download it again"
                ) from error
        return self._open[file]

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._files)

    def lazy(self, name: str) -> Any:
        """The tensor of that name as a safetensors slice: index it to read."""
        if name not in self._files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}, which the model's config.json asks for"
            )
        return self._handle(self._files[name]).get_slice(name)

    def sources(self, entry: Entry, architecture: Architecture) -> list[Any]:
        """The lazy tensors of a table's entry, of the shapes that they must have.

        Raises:
            CheckpointError: one is missing or has another shape than config.json says.
        """
        found = [self.lazy(name) for name in entry.hugging_face]
        for name, tensor, shape in zip(entry.hugging_face, found, entry.shapes(architecture), strict=True):
            if tuple(tensor.get_shape()) != tuple(shape):
                raise CheckpointError(
                    f"{self.folder / self._files[name]}: {name} has shape {tuple(tensor.get_shape())} where "
                    f"config.json asks for {tuple(shape)}; they do not belong together"
                )
        return found


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
