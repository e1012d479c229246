"""Two torchrun agents, as two nodes have them: the numbers of one, and one sentence where the nodes differ."""

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers import agents, main_job
from tests.helpers.agents import Ended, free_port, job, torchrun
from tests.helpers.main_job import exact
from tests.helpers.models import make_llama
from tests.helpers.warm import WarmPython

# None of these runs is to come near it: a hang is what they look for.
LIMIT = 200
# A mount namespace of its own, in which a node can have its own disk.
OWN_MOUNTS = ["unshare", "--mount", "--map-root-user"]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
RunAll = Callable[..., list[Ended]]


@pytest.fixture(scope="module")
def run_all(warm_python: WarmPython) -> RunAll:
    """Commands side by side, see `agents.run_all`."""
    return functools.partial(agents.run_all, environment=warm_python.environment)


def arguments(inputs: dict[str, Path], output: Path, cache: Path, *more: str) -> list[str]:
    found = main_job.arguments({**inputs, "cache": cache}, output)
    return job(*found, "exp_manager.resume_if_exists=true", "trainer.max_steps=3", *more)


@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize(
    ("ranks", "layout", "shared"),
    [
        (1, ["model.pipeline_model_parallel_size=2"], False),
        (2, ["model.tensor_model_parallel_size=2"], True),
    ],
    ids=["a-pipeline-over-nodes-own-caches", "replicas-on-nodes-shared-cache"],
)
def test_two_nodes_train_as_one(
    ranks: int, layout: list[str], shared: bool, run_all: RunAll, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Every number of every step, and every weight, to the last bit; each file is written once."""
    one, two = tmp_path / "one", tmp_path / "two"
    port = free_port()
    alone = [*torchrun(1, 0, 2 * ranks, port), *arguments(inputs, one, tmp_path / "cache", *layout)]
    (ended,) = run_all([alone], LIMIT, tmp_path)
    assert ended.status == 0, ended.output[-2000:]

    caches = [tmp_path / "caches" / ("both" if shared else str(node)) for node in range(2)]
    nodes = [
        [*torchrun(2, node, ranks, port, c10d=shared), *arguments(inputs, two, caches[node], *layout)]
        for node in range(2)
    ]
    both = run_all(nodes, LIMIT, tmp_path)
    assert [ended.status for ended in both] == [0, 0], "\n".join(e.output[-2000:] for e in both)

    for split, lines in (("train", 3), ("validation", 4)):
        assert len(exact(two, split)) == lines
        assert exact(two, split) == exact(one, split)
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (two, one))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)

    assert sum(ended.output.count("results in ") for ended in both) == 1
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["step_0000003"]
    assert len(list(two.glob("events.out.tfevents*"))) == 1
    assert not list(two.glob(".seen-*"))
    # Each node has tokenised both files, or one has for both; the log-probs are where rank 0 has written them.
    for cache in set(caches):
        found = [path for path in (cache / "data").iterdir() if path.is_dir()]
        assert len(found) == 2
        assert not [path for path in found if path.name.endswith(".unfinished")]
    assert [len(list(cache.glob("reference/*/*.npy"))) for cache in caches] in ([2, 2] if shared else [2, 0],)

    # What is done is not done again: the same two nodes find their checkpoint.
    again = run_all(nodes, LIMIT, tmp_path)
    assert [ended.status for ended in again] == [0, 0]
    assert sum(ended.output.count("resumed at step 3") for ended in again) == 1
    assert exact(two)[:3] == exact(one)[:3]


def differing(
    run_all: RunAll, inputs: dict[str, Path], folder: Path, second: list[str], prefix: list[str] | None = None
) -> list[Ended]:
    """The ends of two nodes, the second with `second` at the end of its command and `prefix` before it."""
    port = free_port()
    nodes = [
        [*torchrun(2, node, 1, port), *arguments(inputs, folder / "run", folder / f"cache-{node}")]
        for node in range(2)
    ]
    nodes[1] = [*(prefix or []), *nodes[1], *second]
    return run_all(nodes, LIMIT, folder)


def other_model(inputs: dict[str, Path], folder: Path) -> str:
    return f"model.restore_from_path={make_llama(folder / 'other', max_position_embeddings=512, seed=1)}"


def half_a_model(inputs: dict[str, Path], folder: Path) -> str:
    shutil.copytree(inputs["model"], folder / "half")
    weights = folder / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return f"model.restore_from_path={folder / 'half'}"


def other_data(inputs: dict[str, Path], folder: Path) -> str:
    first, *rest = inputs["train"].read_text().splitlines()
    group = json.loads(first)
    group["responses"][0]["score"] += 1
    (folder / "train.jsonl").write_text("\n".join([json.dumps(group), *rest]))
    return f"model.data.train={folder / 'train.jsonl'}"


def a_file_for_a_folder(inputs: dict[str, Path], folder: Path) -> str:
    (folder / "file").touch()
    return f"model.data.cache_dir={folder / 'file'}"


@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (lambda *_: "model.restore_from_path=/nowhere", "neither a Hugging Face folder"),
        (lambda *_: "model.mpo.bta=1", "unknown key model.mpo.bta; did you mean model.mpo.beta?"),
        (lambda *_: "--config-name=nothing", "there is no nothing.yaml in "),
        (lambda *_: "trainer.max_steps=4", "the same job: trainer.max_steps is 3 for rank 0 on "),
        (
            lambda *_: "model.data.validation=null",
            "the same job: model.data.validation is a path for rank 0 on ",
        ),
        (lambda *_: "model.data.train=/nowhere.jsonl", "there is no file or folder /nowhere.jsonl"),
        (other_model, "is not the same model on all nodes: model.safetensors is "),
        (half_a_model, "is not the same model on all nodes: model.safetensors is "),
        (other_data, "train.jsonl is not the same on all nodes; copy it"),
        (a_file_for_a_folder, "cannot be written (Not a directory), and tokenised data go there; make room"),
    ],
    ids=[
        "no-model",
        "key",
        "no-yaml",
        "steps",
        "no-validation",
        "no-data",
        "model",
        "half-a-model",
        "data",
        "cache",
    ],
)
def test_nodes_that_differ_end_in_one_sentence(
    second: Any, sentence: str, run_all: RunAll, inputs: dict[str, Path], tmp_path: Path
) -> None:
    first, other = differing(run_all, inputs, tmp_path, [second(inputs, tmp_path)])
    assert first.status == other.status == 1
    assert len(first.errors) == 1, first.output[-2000:]
    assert sentence in first.errors[0]
    assert not other.errors
    # torchrun has a traceback of its own for ranks that end with a status.
    for output in (first.output, other.output):
        assert not re.search(r'File ".*/(mpo_megatron|examples)/', output), output[-2000:]


def test_a_folder_that_the_nodes_do_not_share(
    run_all: RunAll, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """The second node has a file system of its own at the experiment's place: no checkpoint could be written there."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine lets no process have mounts of its own")
    (tmp_path / "run").mkdir()
    own = [*OWN_MOUNTS, "sh", "-c", f'mount -t tmpfs none {tmp_path / "run"} && exec "$@"', "sh"]
    first, _ = differing(run_all, inputs, tmp_path, [], own)
    assert first.status == 1
    (error,) = first.errors
    assert "is not there for 1 of 2 ranks, such as rank 1 on " in error
    assert "set exp_manager.exp_dir to storage that all nodes share" in error
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    without = ["trainer.save_at_end=false", "exp_manager.resume_if_exists=false"]
    port = free_port()
    nodes = [
        [
            *torchrun(2, node, 1, port),
            *arguments(inputs, tmp_path / "run", tmp_path / f"cache-{node}", *without),
        ]
        for node in range(2)
    ]
    both = run_all([nodes[0], [*own, *nodes[1]]], LIMIT, tmp_path)
    assert [ended.status for ended in both] == [0, 0], "\n".join(e.output[-2000:] for e in both)
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
