"""A process in which packages that are installed are not: to be called before anything that would import them."""

import importlib.metadata as metadata
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# By the module that is imported, the names under which packages have it.
GPU_LIBRARIES = {
    "transformer_engine": ("transformer-engine", "transformer_engine", "transformer-engine-torch"),
    "flash_attn": ("flash-attn", "flash_attn", "flash-attn-4"),
    "flash_attn_interface": ("flash_attn_3", "flash-attn-3"),
    "apex": ("apex",),
}


def hide(modules: Iterable[str]) -> None:
    """Make imports of these modules, and questions for their versions, fail as where they are not installed."""
    names = {_normal(name) for module in modules for name in GPU_LIBRARIES[module]}
    for module in modules:
        assert module not in sys.modules, f"{module} has been imported"
        # Python's own mark of a module that must not be imported.
        sys.modules[module] = None  # type: ignore[assignment]
    found = metadata.Distribution.from_name.__func__  # type: ignore[attr-defined]

    def from_name(cls: Any, name: str) -> Any:
        if _normal(name) in names:
            raise metadata.PackageNotFoundError(name)
        return found(cls, name)

    metadata.Distribution.from_name = classmethod(from_name)  # type: ignore[assignment]


def leave_version_4_of_flash_attention() -> None:
    """Make flash_attn what it is where version 4 alone is installed: a package without version 2's functions."""
    hide(["flash_attn"])
    package = ModuleType("flash_attn")
    package.__path__ = []
    package.__spec__ = ModuleSpec("flash_attn", None, is_package=True)
    sys.modules["flash_attn"] = package


def _normal(name: str) -> str:
    return name.replace("_", "-").lower()
