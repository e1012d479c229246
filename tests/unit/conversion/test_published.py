"""The sizes at which people train: every tensor has its name, the parameters are as many as published, and each of the
layouts that such a model is trained at is filled by them: on the meta device, without the weights.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mpo_megatron.conversion.load import global_parameter_names
from mpo_megatron.conversion.names import TIED_OUTPUT, by_megatron_name, entries
from mpo_megatron.conversion.transforms import COLUMNS, REPLICATED, Cut, Kind
from mpo_megatron.model.architecture import Architecture, architecture_of, check_layout
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap
from mpo_megatron.runtime.parallel import ParallelLayout
from tests.helpers.fake_ranks import as_rank
from tests.helpers.models import saved_parameters

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
}
# Tensor parallel, pipeline stages, chunks of each stage.
LAYOUTS = {
    "Llama-3.1-8B": [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 1, 1)],
    "Llama-3.3-70B": [(8, 4, 1), (8, 8, 1), (8, 4, 2)],
    "Mistral-7B-v0.3": [(1, 2, 1), (4, 1, 1)],
    "Qwen2.5-7B": [(2, 2, 1), (4, 1, 1)],
    "Qwen2.5-14B": [(4, 2, 1), (8, 1, 1)],
    "Qwen2.5-32B": [(4, 4, 1), (8, 2, 1)],
    "Qwen3-8B": [(1, 2, 1), (2, 1, 1), (4, 1, 1)],
    "Qwen3-14B": [(4, 2, 1), (8, 1, 1)],
    "Qwen3-32B": [(4, 4, 1), (8, 1, 1), (8, 2, 1)],
}


@cache
def published(name: str, tied: bool = False) -> tuple[Architecture, dict[str, torch.Size]]:
    """The architecture, and the shapes that transformers gives the model's tensors."""
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json", tie_word_embeddings=tied)
    with torch.device("meta"):
        theirs = saved_parameters(AutoModelForCausalLM.from_config(config))
    return architecture_of(config, name), {key: parameter.shape for key, parameter in theirs.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_model_is_mapped(name: str) -> None:
    architecture, theirs = published(name)
    ours = [source for entry in entries(architecture) for source in entry.hugging_face]
    assert sorted(ours) == sorted(theirs)
    assert architecture.num_parameters == PARAMETERS[name] == sum(shape.numel() for shape in theirs.values())


@dataclass
class Held:
    """A rank's shard of some Hugging Face tensors: the numbers of its lines, and how many elements they have."""

    sources: tuple[str, ...]
    numbers: Tensor
    elements: int


def check_rank(
    layout: ParallelLayout, architecture: Architecture, shapes: dict[str, torch.Size]
) -> Iterator[Held]:
    """Check that each parameter of the rank takes a shard of its shape. Yields the shards, of copies the first."""
    options = ModelOptions(dtype=torch.bfloat16, sequence_parallel=layout.tp > 1)
    table = by_megatron_name(architecture)
    with torch.device("meta"):
        chunks = build_model(architecture, layout, options)
    for name, parameter in (
        item for chunk in chunks for item in global_parameter_names(unwrap(chunk)).items()
    ):
        entry = table[name]
        cut = Cut(architecture, parameter.size(0) * layout.tp, layout.tp_rank, layout.tp)
        sources = {source: shapes[source] for source in entry.hugging_face}
        assert entry.shapes(architecture) == sources
        with torch.device("meta"):
            shard = entry.kind.cut([torch.empty(shape) for shape in sources.values()], cut)
        assert shard.shape == parameter.shape
        if entry is not TIED_OUTPUT and (entry.kind is not REPLICATED or layout.tp_rank == 0):
            lines = entry.kind.cut(numbered(sources.values(), entry.kind), cut)
            held = lines[lines > 0]  # 0 is the vocabulary's padding
            yield Held(entry.hugging_face, held, held.numel() * (parameter.numel() // lines.numel()))


def numbered(shapes: Iterable[torch.Size], kind: Kind) -> list[Tensor]:
    """Tensors of these shapes, but one element wide: rows, or columns where ranks hold columns, numbered from 1."""
    tensors, start = [], 1
    for shape in shapes:
        length = shape[1] if kind is COLUMNS else shape[0]
        numbers = torch.arange(start, start + length)
        tensors.append(numbers[None] if kind is COLUMNS else numbers.reshape(-1, *(1 for _ in shape[1:])))
        start += length
    return tensors


def check_all_ranks(name: str, tp: int, pp: int, vpp: int, tied: bool = False) -> int:
    """Check each rank, and that no line of a tensor is on two of them. Returns the elements on all ranks together."""
    architecture, shapes = published(name, tied)
    check_layout(architecture, tp=tp, pp=pp, vpp=vpp, max_length=4096)
    found: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    elements = 0
    for rank in range(tp * pp):
        with as_rank(rank, tp, pp, vpp) as layout:
            for held in check_rank(layout, architecture, shapes):
                found[held.sources].append(held.numbers)
                elements += held.elements
    assert sorted(source for sources in found for source in sources) == sorted(shapes)
    for parts in found.values():
        numbers = torch.cat(parts).sort().values
        assert torch.equal(numbers, torch.arange(1, len(numbers) + 1))
    return elements


@pytest.mark.parametrize(
    ("name", "tp", "pp", "vpp"), [(name, *layout) for name, layouts in LAYOUTS.items() for layout in layouts]
)
def test_every_rank_is_filled(name: str, tp: int, pp: int, vpp: int) -> None:
    assert check_all_ranks(name, tp, pp, vpp) == PARAMETERS[name]


def test_every_rank_of_a_tied_model_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No published model with tied embeddings is among these; Qwen3-8B stands for one."""
    # Megatron sums the copies on the first and the last stage up, on the GPU.
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    architecture, _ = published("Qwen3-8B", tied=True)
    untied = architecture.vocab_size * architecture.hidden_size
    assert check_all_ranks("Qwen3-8B", 2, 2, 1, tied=True) == PARAMETERS["Qwen3-8B"] - untied
