"""Which part of the package may import which, checked on the source of every file.

    config ← data, ragged ← scheduling ← model, objectives ← planning, conversion ← training

`errors` is free to all. Only examples/ and tools/ (and tests/) import training.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mpo_megatron"

# A part (module or folder of the package) and the parts that it may import, besides itself and `errors`.
MAY_IMPORT = {
    "__init__": {"objectives"},
    "errors": set(),
    "finite": set(),
    "config": {"finite", "overrides"},
    "overrides": set(),
    "means": set(),
    "pretrained": set(),
    "data": {"config"},
    "ragged": set(),
    "scheduling": {"config", "data", "ragged"},
    "runtime": {"config"},
    "model": {"config", "data", "pretrained", "ragged", "scheduling", "runtime"},
    "objectives": {"config", "data", "finite", "ragged", "scheduling"},
    "conversion": {"config", "data", "pretrained", "ragged", "scheduling", "model", "runtime"},
    "rollout": {"config", "data", "finite", "means", "pretrained"},
    "evaluation": {"config", "data", "means", "rollout"},
    "comparison": {"config", "means", "objectives", "overrides", "rollout", "runtime"},
    "rounds": {
        "config",
        "means",
        "objectives",
        "overrides",
        "runtime",
        "rollout",
        "comparison",
    },
    "planning": {"config", "data", "scheduling", "model"},
    "training": {
        "config",
        "data",
        "ragged",
        "scheduling",
        "runtime",
        "model",
        "objectives",
        "conversion",
        "planning",
        "pretrained",
        "rollout",
    },
    "benchmarks": {
        "config",
        "data",
        "ragged",
        "scheduling",
        "runtime",
        "model",
        "objectives",
        "conversion",
        "planning",
        "rollout",
        "training",
    },
}
# Third parties that a part (or one file of it) does without, even inside functions.
DOES_WITHOUT = {
    "mpo_megatron/config": {"torch", "megatron", "nemo"},
    "mpo_megatron/data": {"torch", "megatron"},
    **{
        # tools/doctor.py runs where torch does not.
        f"mpo_megatron/runtime/{name}.py": {"torch", "megatron"}
        for name in ("choices", "commands", "doctor", "facts", "findings", "surroundings")
    },
    "mpo_megatron/scheduling/layout.py": {"torch", "megatron"},
    "mpo_megatron/scheduling/plan.py": {"torch", "megatron"},
    "mpo_megatron/scheduling/balance.py": {"torch", "megatron"},
    "mpo_megatron/scheduling/order.py": {"torch", "megatron"},
    "mpo_megatron/scheduling": {"megatron"},
    "mpo_megatron/ragged": {"megatron"},
    "mpo_megatron/objectives": {"megatron"},
    "mpo_megatron/rollout": {"megatron"},
    "mpo_megatron/evaluation": {"torch", "megatron"},
    "mpo_megatron/comparison": {"megatron", "nemo"},
    "mpo_megatron/rounds": {"megatron", "nemo"},
    "mpo_megatron/planning": {"torch", "megatron", "nemo"},
}
# Not on every machine: imported only where they are used, inside functions.
NEVER_AT_MODULE_LEVEL = {"transformer_engine", "apex", "flash_attn", "vllm", "wandb", "trl", "tiktoken"}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the import runs when the importing module is loaded."""

    module: str
    line: int
    at_module_level: bool


class _Imports(ast.NodeVisitor):
    """Collects a file's imports, relative ones made absolute."""

    def __init__(self, package: list[str]) -> None:
        self._package = package
        self._deferred = 0  # how many enclosing functions and `if TYPE_CHECKING` blocks
        self.found: list[Import] = []

    def _add(self, module: str, node: ast.AST) -> None:
        self.found.append(Import(module, getattr(node, "lineno", 0), not self._deferred))

    def _visit_deferred(self, nodes: list[ast.stmt] | list[ast.expr]) -> None:
        self._deferred += 1
        for node in nodes:
            self.visit(node)
        self._deferred -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_deferred(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self._visit_deferred(node.body)
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parent = self._package[: len(self._package) - node.level + 1] if node.level else []
        module = ".".join([*parent, *([node.module] if node.module else [])])
        if module == PACKAGE:  # `from mpo_megatron import data`: the names may be parts
            for alias in node.names:
                self._add(f"{module}.{alias.name}", node)
        else:
            self._add(module, node)

    def visit_Call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0] if node.args else None
        if function in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self._add(str(first.value), node)
        self.generic_visit(node)


def imports(path: PurePosixPath, source: str) -> list[Import]:
    """The imports of a file, `path` relative to the repository."""
    visitor = _Imports(list(path.parent.parts))
    visitor.visit(ast.parse(source))
    return visitor.found


def part_of(module: str) -> str | None:
    """The part of the package that a module belongs to; None outside of the package, and for its version."""
    names = module.split(".")
    if names[0] != PACKAGE or names[1:] in ([], ["__version__"]):
        return None
    return names[1] if names[1] in MAY_IMPORT else "__init__"


def violations(path: PurePosixPath, source: str) -> Iterator[str]:
    """A sentence for each import in `source` that the rules above do not allow."""
    inside = path.parts[0] == PACKAGE
    part = path.with_suffix("").parts[1] if inside else ""
    if inside and part not in MAY_IMPORT:
        yield f"{path}: {part} is in no rule; add it to MAY_IMPORT in tests/unit/test_imports.py"
        return
    without = set().union(*(names for place, names in DOES_WITHOUT.items() if path.is_relative_to(place)))
    for found in imports(path, source):
        top = found.module.split(".")[0]
        where = f"{path}:{found.line}: imports {found.module}"
        target = part_of(found.module)
        if inside and target and target not in {part, "errors", *MAY_IMPORT[part]}:
            yield f"{where}; {part} may import {', '.join(sorted(MAY_IMPORT[part])) or 'errors alone'}"
        if top in without:
            yield f"{where}; this file does without {top}"
        if top in NEVER_AT_MODULE_LEVEL and found.at_module_level:
            yield f"{where} at module level; import it where it is used"


def source_files() -> list[Path]:
    folders = (PACKAGE, "tools", "examples", "tests")
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if ".work" not in path.parts
    )


def test_every_file_keeps_the_rules() -> None:
    files = source_files()
    assert len(files) > 20
    broken = [
        sentence
        for file in files
        for sentence in violations(PurePosixPath(file.relative_to(ROOT).as_posix()), file.read_text())
    ]
    assert not broken, "\n".join(broken)


def test_the_rules_have_no_circle() -> None:
    remaining = dict(MAY_IMPORT)
    while remaining:
        free = [part for part, others in remaining.items() if not others & remaining.keys()]
        assert free, f"these import each other: {sorted(remaining)}"
        for part in free:
            del remaining[part]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mpo_megatron/data/readers.py", "from mpo_megatron.scheduling.plan import plan"),
        ("mpo_megatron/data/readers.py", "from mpo_megatron import model"),
        ("mpo_megatron/data/readers.py", "from ..scheduling import plan"),
        ("mpo_megatron/data/readers.py", "from .. import scheduling"),
        ("mpo_megatron/data/readers.py", "def f():\n    import mpo_megatron.model.head as head"),
        ("mpo_megatron/data/readers.py", "def f():\n    import torch"),
        ("mpo_megatron/data/readers.py", "import importlib\nimportlib.import_module('torch.nn')"),
        ("mpo_megatron/data/readers.py", "from mpo_megatron import mpo_loss"),
        ("mpo_megatron/scheduling/plan.py", "from torch import Tensor"),
        ("mpo_megatron/objectives/mpo.py", "def f():\n    from megatron.core import parallel_state"),
        ("mpo_megatron/objectives/mpo.py", "from mpo_megatron.model.head import ResponseHead"),
        ("mpo_megatron/model/head.py", "from mpo_megatron.training import step"),
        ("mpo_megatron/model/head.py", "from mpo_megatron.objectives import get"),
        ("mpo_megatron/rollout/rewards.py", "from mpo_megatron.training import step"),
        ("mpo_megatron/config/schema.py", "from mpo_megatron.data import schema"),
        ("mpo_megatron/model/attention.py", "import transformer_engine.pytorch as te"),
        ("mpo_megatron/model/attention.py", "try:\n    import flash_attn\nexcept ImportError:\n    pass"),
        ("mpo_megatron/model/attention.py", "class A:\n    from apex import normalization"),
        ("tools/generate.py", "import vllm"),
        ("mpo_megatron/unheard_of.py", "import json"),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert len(list(violations(PurePosixPath(path), source))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mpo_megatron/data/readers.py", "from mpo_megatron.errors import ConfigError\nfrom . import schema"),
        ("mpo_megatron/data/readers.py", "from mpo_megatron import errors\nimport json"),
        ("mpo_megatron/scheduling/pack.py", "import torch\nfrom ..data import dataset"),
        ("mpo_megatron/model/attention.py", "def f():\n    import transformer_engine.pytorch"),
        (
            "mpo_megatron/model/attention.py",
            "if TYPE_CHECKING:\n    import flash_attn\nelse:\n    import json",
        ),
        ("mpo_megatron/model/head.py", "from mpo_megatron import __version__"),
        ("tools/report.py", "from mpo_megatron.training import report"),
        ("examples/mpo_gpt.py", "from mpo_megatron.training.trainer import train"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert list(violations(PurePosixPath(path), source)) == []
