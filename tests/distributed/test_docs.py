"""The commands of docs/, word for word, on a small model and two CPU ranks; of docs/launch.md in test_launch.py.

A page's blocks run in order, each in a shell of its own. What they name, such as $MODEL, is in the environment.
"""

import json
from pathlib import Path

import pytest

from mpo_megatron.data.readers import read_groups
from mpo_megatron.objectives.metrics import METRICS
from tests.helpers.agents import run_all
from tests.helpers.main_job import metrics, write_data
from tests.helpers.models import make_llama
from tests.helpers.pages import DOCS, ROOT, blocks, pages, rows
from tests.helpers.warm import WarmPython

LIMIT = 240
# docs/launch.md needs several agents and Slurm.
PAGES = [page for page in pages() if page.stem != "launch" and blocks(page, "bash")]

NEMO_RL = {
    "context": [{"role": "user", "content": "Name a colour."}],
    "completions": [
        {"rank": 1, "completion": [{"role": "assistant", "content": "Dog."}]},
        {"rank": 0, "completion": [{"role": "assistant", "content": "Red."}]},
    ],
}
VERL = {
    "data_source": "colours",
    "prompt": [{"role": "user", "content": "Name a colour."}],
    "ability": "words",
    "reward_model": {"style": "rule", "ground_truth": "Red"},
    "extra_info": {"split": "train", "index": 0},
    "responses": ["Dog.", "Red."],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the pages' commands name."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("docs")
    model = make_llama(folder / "model", max_position_embeddings=8192)
    train = write_data(folder / "train.jsonl", 40, 0)
    (folder / "nemo-rl.jsonl").write_text(json.dumps(NEMO_RL) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist([VERL]), folder / "verl.parquet")
    return {
        "MODEL": str(model),
        "TRAIN": str(train),
        "HELD_OUT": str(write_data(folder / "validation.jsonl", 12, 1)),
        "RUN": str(folder / "run"),
        "CACHE": str(folder / "cache"),
        "RANKS": "2",
        "OVERRIDES": f"trainer.max_steps=3 model.data.train={train} model.data.cache_dir={folder / 'cache'}",
        "NEMO_RL": str(folder / "nemo-rl.jsonl"),
        "VERL": str(folder / "verl.parquet"),
        "CONVERTED": str(folder / "converted.jsonl"),
    }


def run_page(page: Path, settings: dict[str, str], folder: Path, python: WarmPython) -> list[str]:
    """Run a page's bash blocks; what each has printed."""
    outputs = []
    for block in blocks(page, "bash"):
        command = ["bash", "-euo", "pipefail", "-c", f"cd {ROOT}\n{block.text}"]
        (ended,) = run_all([command], LIMIT, folder, {**settings, **python.environment})
        assert ended.status == 0, f"{page.name}:\n{block.text}\n{ended.output[-3000:]}"
        outputs.append(ended.output)
    return outputs


@pytest.fixture(scope="module")
def first_run(
    settings: dict[str, str], warm_python: WarmPython, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the run that docs/first-run.md makes; other pages read it."""
    outputs = run_page(DOCS / "first-run.md", settings, tmp_path_factory.mktemp("first"), warm_python)
    told = [line for output in outputs for line in output.splitlines()]
    # The lines that the page explains.
    for name in (
        "model",
        "runs on",
        "objective",
        "training",
        "validation",
        "rows",
        "steps",
        "planned",
        "masters",
    ):
        assert any(line.startswith(f"{name} ") for line in told), name
    return Path(settings["RUN"])


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT)
def test_the_first_run(first_run: Path, settings: dict[str, str]) -> None:
    first = metrics(first_run, "validation")[0]
    assert (first["step"], first["reward_margin"], first["accuracy"]) == (0, 0, 0.5)
    assert [line["step"] for line in metrics(first_run)] == [1, 2, 3]
    # Exported twice, by the run and of its checkpoint.
    exports = [(first_run / name / "model.safetensors").read_bytes() for name in ("hf", "exported")]
    assert exports[0] == exports[1]


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT)
def test_the_page_has_every_metric(first_run: Path) -> None:
    """The run is in bf16 on CPU ranks: it has all keys that any run has."""
    table = {cells[0].strip("`"): cells[1] for cells in rows(DOCS / "metrics.md")}
    lines = [json.loads(line) for line in (first_run / "metrics.jsonl").read_text().splitlines()]
    found = {
        split: {key for line in lines if line["split"] == split for key in line}
        for split in ("train", "validation")
    }
    assert set(table) == found["train"]
    assert {key for key, split in table.items() if split == "both"} == found["validation"]
    assert found["validation"] == {"step", "split", *METRICS}


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != "first-run"], ids=lambda page: page.stem
)
def test_the_commands_of_a_page(
    page: Path, first_run: Path, settings: dict[str, str], warm_python: WarmPython, tmp_path: Path
) -> None:
    outputs = run_page(page, settings, tmp_path, warm_python)
    if page.stem == "extending":
        hinge = metrics(Path(f"{settings['RUN']}.hinge"))
        assert [line["step"] for line in hinge] == [1, 2, 3]
        # At step 0 each pair is at its margin: log-ratios are 0.
        assert hinge[0]["loss"] == 1
        assert hinge[-1]["loss"] < 1
    if page.stem == "data":
        (group,) = read_groups(settings["CONVERTED"])  # of verl, the last that is turned
        assert [(response.text, response.score) for response in group.responses] == [
            ("Dog.", 0),
            ("Red.", 10),
        ]
    if page.stem == "metrics":
        assert outputs[0].startswith("step 0: margin +0.0000, accuracy 50.0%\n")


def test_ranks_become_scores(settings: dict[str, str], warm_python: WarmPython, tmp_path: Path) -> None:
    block = next(block for block in blocks(DOCS / "data.md", "bash") if "$NEMO_RL" in block.text)
    target = tmp_path / "nemo-rl.jsonl"
    files = {"NEMO_RL": settings["NEMO_RL"], "CONVERTED": str(target)}
    (ended,) = run_all([["bash", "-euc", block.text]], LIMIT, tmp_path, {**files, **warm_python.environment})
    assert ended.status == 0, ended.output
    (group,) = read_groups(target)
    assert [(response.text, response.score) for response in group.responses] == [("Dog.", -1), ("Red.", 0)]
