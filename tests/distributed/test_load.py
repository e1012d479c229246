"""What the ranks hold after a start from a Hugging Face folder, and what they say of a folder that is not right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpo_megatron.conversion.hf_folder import SINGLE, WeightReader
from mpo_megatron.conversion.load import global_parameter_names, load_hf_weights
from mpo_megatron.conversion.names import by_megatron_name
from mpo_megatron.conversion.transforms import Cut
from mpo_megatron.errors import UserError
from mpo_megatron.model.architecture import read_architecture
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import ParallelLayout, initialize
from tests.distributed.jobs import Layout
from tests.helpers.models import make_llama, make_model


@dataclass
class Loaded:
    """A rank's parameters after the start."""

    layout: ParallelLayout
    parameters: dict[str, Tensor]


def load(folder: Path, readers_folder: Path, wanted: Layout) -> Loaded:
    """Fill a model whose memory holds NaN; the first replica is given `readers_folder`, the others `folder`."""
    layout = initialize(
        choose_device("cpu"), tp=wanted.tp, pp=wanted.pp, vpp=wanted.vpp, cp=wanted.cp, ep=wanted.ep
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    architecture = read_architecture(folder)
    chunks = build_model(architecture, layout, ModelOptions(dtype=wanted.precision))
    models = [unwrap(chunk) for chunk in chunks]
    parameters = {
        name: parameter.data for model in models for name, parameter in global_parameter_names(model).items()
    }
    for parameter in parameters.values():
        parameter.fill_(float("nan"))
    reads = layout.dp_rank == layout.cp_rank == 0
    load_hf_weights(models, architecture, layout, readers_folder if reads else folder)
    return Loaded(replace(layout, control=None), parameters)  # a process group stays in its process


class CountingSlice:
    """A safetensors slice that adds up the bytes that are read of it."""

    def __init__(self, inner: Any, counts: list[int]) -> None:
        self.inner, self.counts = inner, counts
        self.get_shape = inner.get_shape

    def __getitem__(self, key: Any) -> Tensor:
        values: Tensor = self.inner[key]
        self.counts.append(values.nbytes)
        return values


def load_and_count(folder: Path, wanted: Layout) -> tuple[Loaded, int]:
    """Fill a model of the folder. Returns what it holds and the bytes of weights that this rank has read."""
    slices, counts = WeightReader.slices, list[int]()

    def counting(reader: WeightReader, names: Sequence[str]) -> list[Any]:
        return [CountingSlice(one, counts) for one in slices(reader, names)]

    WeightReader.slices = counting  # type: ignore[assignment,method-assign]
    try:
        return load(folder, folder, wanted), sum(counts)
    finally:
        WeightReader.slices = slices  # type: ignore[method-assign]


def load_error(folder: Path, wanted: Layout) -> str:
    """The same of one folder. Returns the user's error, or nothing."""
    try:
        load(folder, folder, wanted)
    except UserError as error:
        return str(error)
    return ""


def load_error_of_a_vanishing_file(folder: Path, wanted: Layout) -> str:
    """The same with a file that was whole when the headers were read, and is gone when one layer's turn comes."""
    slices = WeightReader.slices

    def late(reader: WeightReader, names: Sequence[str]) -> list[Any]:
        if "model.layers.2.self_attn.o_proj.weight" in names:
            (folder / SINGLE).unlink()
        return slices(reader, names)

    WeightReader.slices = late  # type: ignore[assignment,method-assign]
    try:
        return load_error(folder, wanted)
    finally:
        WeightReader.slices = slices  # type: ignore[method-assign]


def assert_filled(loaded: Loaded, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Every parameter holds its slice of the Hugging Face weights, in `dtype`."""
    architecture, layout = read_architecture(folder), loaded.layout
    table = by_megatron_name(architecture)
    assert loaded.parameters
    for name, parameter in loaded.parameters.items():
        entry = table[name]
        cut = Cut(architecture, parameter.size(0) * layout.tp, layout.tp_rank, layout.tp)
        expected = entry.kind.cut([weights[source] for source in entry.hugging_face], cut)
        assert parameter.dtype == dtype
        assert torch.equal(parameter, expected.to(dtype)), name


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, Layout()),
        (2, Layout(cp=2)),
        (4, Layout(tp=2)),
        (4, Layout(pp=2)),
        (4, Layout(pp=2, vpp=2)),
        (4, Layout(cp=2)),
    ],
    ids=["dp2", "cp2", "tp2-dp2", "pp2-dp2", "pp2-vpp2-dp2", "cp2-dp2"],
)
def test_the_first_replica_reads_for_all(world: int, layout: Layout, ranks: Any, tmp_path: Path) -> None:
    """The other replicas are given a folder that holds no weights."""
    folder = make_llama(tmp_path, tie_word_embeddings=False)
    readers_folder = make_llama(tmp_path / "readers", tie_word_embeddings=False)
    (folder / SINGLE).unlink()
    weights = load_file(readers_folder / SINGLE)
    found: list[Loaded] = ranks(world).run(load, folder, readers_folder, layout)
    assert sum(loaded.layout.dp_rank == loaded.layout.cp_rank == 0 for loaded in found) < world
    for loaded in found:
        assert_filled(loaded, weights, folder, torch.float32)


@pytest.mark.parametrize(
    ("family", "world", "layout", "readers"),
    [
        ("llama", 2, Layout(), [0]),
        ("llama", 4, Layout(cp=2), [0]),
        ("llama", 4, Layout(tp=2), [0, 1]),
        ("llama", 4, Layout(pp=2), [0, 2]),
        # Each of two ranks has half of the experts; the first has all else.
        ("qwen3_moe", 4, Layout(ep=2), [0, 1]),
    ],
    ids=["dp2", "cp2-dp2", "tp2-dp2", "pp2-dp2", "ep2-edp2"],
)
def test_each_byte_is_read_by_one_rank(
    family: str, world: int, layout: Layout, readers: list[int], ranks: Any, tmp_path: Path
) -> None:
    """What tensor-parallel ranks hold whole, the norms, each of them reads."""
    folder = make_model(tmp_path / "model", family, tie_word_embeddings=False)
    weights = load_file(folder / SINGLE)
    found: list[tuple[Loaded, int]] = ranks(world).run(load_and_count, folder, layout)
    for loaded, _ in found:
        assert_filled(loaded, weights, folder, torch.float32)
    assert [rank for rank, (_, read) in enumerate(found) if read] == readers
    whole = sum(tensor.nbytes for tensor in weights.values())
    norms = sum(tensor.nbytes for name, tensor in weights.items() if "norm" in name)
    assert sum(read for _, read in found) == whole + (layout.tp - 1) * norms
    if family == "qwen3_moe":
        experts = sum(tensor.nbytes for name, tensor in weights.items() if ".experts." in name)
        assert [read for _, read in found] == [whole - experts // 2, experts // 2, 0, 0]


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_rounded_once(
    source: torch.dtype, target: torch.dtype, ranks: Any, tmp_path: Path
) -> None:
    folder = make_llama(tmp_path, dtype=source)
    weights = load_file(folder / SINGLE)
    name = "model.norm.weight"
    # The last two are float16's largest number and its smallest positive one.
    weights[name][:4] = torch.tensor([1 + 2**-9, -1 - 2**-8, 65504.0, 2**-24])
    save_file(weights, folder / SINGLE)
    if torch.bfloat16 in (source, target):  # 8 significant bits, ties to even
        expected = [1.0, -1.0, 65536.0, 2**-24]
    else:
        expected = [1 + 2**-9, -1 - 2**-8, 65504.0, 2**-24]
    for loaded in ranks(2).run(load, folder, folder, Layout(tp=2, precision=target)):
        assert_filled(loaded, weights, folder, target)
        assert loaded.parameters["decoder.final_layernorm.weight"][:4].tolist() == expected


def test_an_error_amid_reading_is_every_ranks_error(ranks: Any, tmp_path: Path) -> None:
    """One rank of four reads the layer whose file is gone."""
    folder = make_llama(tmp_path)
    errors = ranks(4).run(load_error_of_a_vanishing_file, folder, Layout(pp=2), timeout=60)
    assert f"{folder / SINGLE} cannot be read" in errors[0]
    assert errors == [errors[0]] * 4


def longer(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        # Too many rows: the slices would have the right shapes all the same.
        ("model.layers.2.self_attn.q_proj.weight", longer, "q_proj.weight has the shape (64, 32), and by"),
        ("model.embed_tokens.weight", longer, "embed_tokens.weight has the shape (746, 32), and by"),
        ("model.layers.0.mlp.down_proj.weight", longer, "down_proj.weight has the shape (64, 48), and by"),
        ("model.norm.weight", longer, "norm.weight has the shape (64,), and by config.json (32,)"),
        ("model.norm.weight", Tensor.long, "norm.weight is stored as I64"),
        ("model.norm.weight", None, "has no tensor 'model.norm.weight'"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, change: Any, message: str, ranks: Any, tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    weights = load_file(folder / SINGLE)
    old = weights.pop(name)
    save_file(weights | ({name: change(old)} if change else {}), folder / SINGLE)
    errors = ranks(4).run(load_error, folder, Layout(tp=2))
    assert message in errors[0]
    assert errors == [errors[0]] * 4


def test_tied_weights_with_an_output_layer_of_their_own_are_refused(ranks: Any, tmp_path: Path) -> None:
    """transformers would not tie them. A copy, which older files hold, is as good as none."""
    folder = make_llama(tmp_path)
    weights = load_file(folder / SINGLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / SINGLE)
    assert ranks(2).run(load_error, folder, Layout(pp=2)) == ["", ""]
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    errors = ranks(2).run(load_error, folder, Layout(tp=2))
    assert "lm_head.weight has values of its own; set tie_word_embeddings to false" in errors[0]
    assert errors == [errors[0]] * 2
