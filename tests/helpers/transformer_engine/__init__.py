"""Transformer Engine's layers on CPU ranks: its own Python, its compiled extension replaced by operations of torch.

    RankProcesses(setup="tests.helpers.transformer_engine:set_up", ...)     each rank, before anything is imported

What is Transformer Engine's own: the modules with their parameters, names and marks, the tensor- and sequence-parallel
communication inside them, the autograd functions, weight gradients accumulated into main_grad, FP8 recipes, quantizers,
amax histories and their reductions, `_extra_state`, FusedAdam, DotProductAttention with its unfused path, and all
checks of arguments. What stands in for kernels: `operations` (products, norms, rotary embedding, optimizer steps) and
`float8` (casts to 8 bits). What is in neither raises NotImplementedError with its name when it is called; nothing is
left out in silence.

The wheel is Python only. tools/setup_venv.sh unpacks it into `.venv/transformer_engine`, a folder of its own: in
site-packages, without the libraries it looks for, it would stop the import of Megatron-core.
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(sys.prefix) / "transformer_engine"


def is_there() -> bool:
    """Whether the set-up has unpacked the wheel."""
    return (FOLDER / "transformer_engine" / "pytorch").is_dir()


def set_up() -> None:
    """Make this process a CPU rank with its layers; it must have imported neither Megatron-core nor the package."""
    install()
    from tests.distributed import rank_setup
    from tests.helpers.transformer_engine.device import answer_for_the_gpu

    rank_setup.set_up()
    answer_for_the_gpu()


def tear_down() -> None:
    """After each case: delayed scaling keeps amax histories, and the group that reduces them, for the whole process."""
    from megatron.core import parallel_state
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    parallel_state.destroy_model_parallel()


def install() -> None:
    """Make `import transformer_engine.pytorch` work from the unpacked wheel.

    Megatron-core must not have been imported: it looks once for what is there.
    """
    assert "megatron.core" not in sys.modules, "Megatron-core has been imported without Transformer Engine"
    from tests.helpers.transformer_engine.extension import NAME, Absent, make_extension

    # It is not looked for libraries of CUDA, delayed scaling is updated in Python, and nothing is compiled.
    os.environ |= {
        "NVTE_PROJECT_BUILDING": "1", "NVTE_UNFUSED_FP8_UPDATE": "1", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    sys.path.append(str(FOLDER))
    sys.modules[NAME] = make_extension(FOLDER / "transformer_engine" / "pytorch")
    sys.meta_path.insert(0, _LeftOut(Absent))

    # The package's own __init__ would load the libraries.
    package = ModuleType("transformer_engine")
    package.__path__ = [str(FOLDER / "transformer_engine")]
    package.__spec__ = ModuleSpec("transformer_engine", None, is_package=True)
    package.__version__ = version("transformer-engine")  # type: ignore[attr-defined]
    sys.modules["transformer_engine"] = package
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    package.common = common  # type: ignore[attr-defined]
    package.pytorch = importlib.import_module("transformer_engine.pytorch")  # type: ignore[attr-defined]


class _LeftOut:
    """Finds the modules of kernels in Triton and of ONNX: they are there, and each name in them raises when called."""

    def __init__(self, module: type[ModuleType]) -> None:
        self._module = module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        here, _, rest = name.partition("transformer_engine.pytorch.")
        is_one = not here and rest.split(".")[0] in ("triton", "onnx_extensions")
        return ModuleSpec(name, self, is_package=True) if is_one else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...
