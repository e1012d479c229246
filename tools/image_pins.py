"""Which versions a container image gets, so that nothing of the image is replaced: the Dockerfile's two pip passes.

    python tools/image_pins.py requirements                    what the package needs and the image does not bring
    python tools/image_pins.py free      > free.txt            constraints of a first, dry pass
    python tools/image_pins.py held REPORT > held.txt          constraints of the real one, from the first one's report
    python tools/image_pins.py built     > before.txt          the versions that must stay; compare afterwards

The image's builds of torch and of what is compiled against it are kept in both passes. The first leaves the image's
other packages free, and its report says which of them are too old for this package; the second holds all others where
they are. What the image lacks has the version of constraints.txt.
"""

import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# Compiled for the image, or for these.
BUILT = re.compile(
    r"torch|torchvision|torchaudio|torchao|(pytorch-)?triton|transformer-engine(-\w+)*|flash-attn(-\w+)*|apex|numpy"
    r"|(nvidia|cuda|tensorrt)(-\w+)*"
)
# NumPy 1.26, which images are built with, where the versions in constraints.txt ask for NumPy 2.
FOR_NUMPY_1 = {"ml-dtypes": "0.5.4", "pandas": "2.3.3"}


def normalized(name: str) -> str:
    """A package's name as the index has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """The image's packages: version by name."""
    return {normalized(found.metadata["Name"]): found.version for found in distributions()}


def pinned(constraints: str) -> dict[str, str]:
    """Version by name in a constraints file, for this Python."""
    pins = {}
    for line in constraints.splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        if requirement.strip() and (not marker.strip() or Marker(marker.strip()).evaluate()):
            name, _, version = requirement.strip().partition("==")
            pins[normalized(name)] = version.strip()
    return pins


def requirements(project: str) -> list[str]:
    """What a pyproject.toml asks for, without what is the image's own."""
    asked = map(Requirement, tomllib.loads(project)["project"]["dependencies"])
    return [str(requirement) for requirement in asked if not BUILT.fullmatch(normalized(requirement.name))]


def free(image: Mapping[str, str], pins: Mapping[str, str]) -> dict[str, str]:
    """Constraints of the first pass: the image's builds as they are, our pins of what the image lacks."""
    built = {name: version for name, version in image.items() if BUILT.fullmatch(name)}
    older = FOR_NUMPY_1 if image.get("numpy", "2").startswith("1.") else {}
    lacking = {name: version for name, version in {**pins, **older}.items() if name not in image}
    return {**lacking, **built}


def held(image: Mapping[str, str], pins: Mapping[str, str], report: dict) -> dict[str, str]:
    """Constraints of the second pass: the image's packages as they are, but for those that the first would replace."""
    found = {
        normalized(item["metadata"]["name"]): item["metadata"]["version"]
        for item in report.get("install", [])
    }
    return {**free(image, pins), **found, **{name: v for name, v in image.items() if name not in found}}


def _lines(versions: Mapping[str, str]) -> Iterable[str]:
    return (f"{name}=={version}" for name, version in sorted(versions.items()))


def main(arguments: list[str]) -> int:
    """Print what was asked for."""
    match arguments:
        case ["requirements"]:
            lines: Iterable[str] = requirements((ROOT / "pyproject.toml").read_text())
        case ["free"]:
            lines = _lines(free(installed(), pinned((ROOT / "constraints.txt").read_text())))
        case ["held", report]:
            pins = pinned((ROOT / "constraints.txt").read_text())
            lines = _lines(held(installed(), pins, json.loads(Path(report).read_text())))
        case ["built"]:
            lines = _lines({name: version for name, version in installed().items() if BUILT.fullmatch(name)})
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
