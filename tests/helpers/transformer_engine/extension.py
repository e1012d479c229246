"""The module `transformer_engine_torch`, with what this package has in place of its compiled functions."""

import enum
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.helpers.transformer_engine import float8, operations
from tests.helpers.transformer_engine.dtypes import DType

NAME = "transformer_engine_torch"


class Absent(ModuleType):
    """A module in which every name that it does not have is a function that says so when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} has no counterpart on the CPU")

        return missing


# What its Python asks of the extension beside operations: versions and properties of a machine with a recent GPU.
_ANSWERS = {
    "get_cudnn_version": 91000,
    "get_cublasLt_version": 130000,
    "get_num_cublas_streams": 4,
    "device_supports_multicast": False,
    "ubuf_built_with_mpi": False,
}
# An enumeration is named with the module before it, or was imported from there.
_MEMBER = re.compile(r"\b(?:tex\.([A-Z]\w+)|(NVTE_\w+|FP8FwdTensors|FP8BwdTensors))\.([A-Z]\w*)")
# Of these the values mean something: a module's quantizers are in this order.
_ORDERED = {
    "FP8FwdTensors": [f"GEMM{i}_{part}" for i in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")],
    "FP8BwdTensors": [f"GRAD_{part}{i}" for i in (1, 2, 3) for part in ("OUTPUT", "INPUT")],
}


class _Class(type):
    """Of classes that are only named, in annotations and isinstance: overlap buffers and the like."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{NAME}.{cls.__name__} has no counterpart on the CPU")


def make_extension(sources: Path) -> ModuleType:
    """The module, for the Python sources of that version of Transformer Engine."""
    extension = Absent(NAME)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(sources.rglob("*.py")))
    # `from transformer_engine_torch import X`, and names of the module that are bound at import, have to be there.
    for name in sorted(set(re.findall(r"\btex\.([A-Za-z]\w+)", text)) | _imported(text)):
        value = _Class(name, (), {}) if name[0].isupper() else getattr(extension, name)
        setattr(extension, name, value)
    for name, members in (_enumerations(text) | _ORDERED).items():
        setattr(extension, name, enum.IntEnum(name, {member: i for i, member in enumerate(members)}))
    for name, answer in _ANSWERS.items():
        setattr(extension, name, lambda *args, answer=answer: answer)
    none: Any = extension.NVTE_Fused_Attn_Backend.NVTE_No_Backend
    # Its unfused path, of torch operations, is what is left.
    extension.get_fused_attn_backend = lambda *args, **kwargs: (none, "a CPU has none")  # type: ignore[attr-defined]
    for module in (operations, float8):
        for name in module.__all__:
            setattr(extension, name, getattr(module, name))
    extension.DType = DType  # type: ignore[attr-defined]
    return extension


def _imported(text: str) -> set[str]:
    """Names that the sources import from the module."""
    found = re.findall(rf"from {NAME} import (?:\(([^)]*)\)|(.*))", text)
    return {
        name.strip() for pair in found for name in ",".join(pair).split(",") if name.strip().isidentifier()
    }


def _enumerations(text: str) -> dict[str, list[str]]:
    """The members of each enumeration, in the order in which the sources name them; those values mean nothing."""
    found: dict[str, list[str]] = {}
    for qualified, imported, member in _MEMBER.findall(text):
        found.setdefault(qualified or imported, []).append(member)
    for alias, name in re.findall(r"^(\w+) = tex\.(NVTE\w+)$", text, re.MULTILINE):
        found.setdefault(name, []).extend(re.findall(rf"\b{alias}\.([A-Z]\w*)", text))
    return {name: list(dict.fromkeys(members)) for name, members in found.items()}
