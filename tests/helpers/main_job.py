"""The main job on a small model: what it is given, its run on a rank, and what it has written."""

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.errors import UserError
from tests.helpers.models import make_llama


def make_inputs(
    folder: Path, model: Path | None = None, groups: tuple[int, int] = (40, 12)
) -> dict[str, Path]:
    """What `arguments` names: a model, a small Llama in float32 where none is given; data; a folder for caches.

    Args:
        groups: for training and for validation.
    """
    return {
        "model": model or make_llama(folder / "model", max_position_embeddings=512),
        "train": write_data(folder / "train.jsonl", groups[0], 0),
        "validation": write_data(folder / "validation.jsonl", groups[1], 1),
        "cache": folder / "cache",
    }


def job(overrides: list[str]) -> str:
    """Run the main job with Hydra overrides of conf/mpo_gpt.yaml. Returns the user's error, or nothing."""
    from mpo_megatron.config.groups import CONF, compose_config
    from mpo_megatron.training.trainer import train

    try:
        train(compose_config(CONF / "mpo_gpt.yaml", overrides))
    except UserError as error:
        return str(error)
    return ""


def write_data(path: Path, groups: int, seed: int) -> Path:
    """Groups with answers of words that the tokenizer knows; longer answers score higher."""
    random = np.random.default_rng(seed)
    words = ["red", "green", "blue", "the", "rainbow", "fox", "dog", "colours", "lazy", "brown"]
    with path.open("w") as file:
        for number in range(groups):
            responses: list[dict[str, Any]] = []
            for _ in range(int(random.integers(2, 6))):
                length = int(random.integers(1, 9))
                responses.append({"text": " ".join(random.choice(words, length)), "score": float(length)})
            responses[0]["score"] += 0.5
            line = {"id": f"g{number}", "prompt": f"Name {number} colours.", "responses": responses}
            file.write(json.dumps(line) + "\n")
    return path


def arguments(inputs: dict[str, Path], folder: Path, *more: str) -> list[str]:
    return [
        f"model.restore_from_path={inputs['model']}",
        f"model.data.train={inputs['train']}",
        f"model.data.validation={inputs['validation']}",
        f"model.data.cache_dir={inputs['cache']}",
        f"exp_manager.explicit_log_dir={folder}",
        "trainer.max_steps=10",
        "model.optim.lr=1e-3",
        "model.max_tokens_per_micro_batch=512",
        *more,
    ]


def metrics(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def exact(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The same without what a clock says, and what memory the process has had: what two runs can have in common."""
    measured = {
        "groups_per_second",
        "tokens_per_second",
        "seconds",
        "data_seconds",
        "rank_seconds",
        "rank_spread",
        "slowest_rank",
        "tflops",
        "mfu",
        "peak_memory",
    }
    return [{key: line[key] for key in line.keys() - measured} for line in metrics(folder, split)]


def job_killed_after(overrides: list[str], steps: int, lines: Path) -> str:
    """Run the job, and stop it by an exception after that many steps, as a crash would."""
    from mpo_megatron.training import trainer

    class Crash(Exception):
        pass

    step = trainer.train_step

    def counted(current: Any, number: int, *more: Any) -> dict[str, float]:
        if number > steps:
            raise Crash
        return step(current, number, *more)

    trainer.train_step = counted  # type: ignore[assignment]
    try:
        job(overrides)
    except Crash:
        return "stopped"
    finally:
        trainer.train_step = step
    return "ended"


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, [path for path in paths if not path.exists()]
        time.sleep(0.1)


def printed(overrides: list[str]) -> str:
    """Run the job. Returns what this rank has printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert job(overrides) == ""
    return output.getvalue()
