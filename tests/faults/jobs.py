"""What the fault tests share: a small job, and whether what it has left is whole."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from mpo_megatron.conversion.buckets import StateReader
from mpo_megatron.conversion.integrity import check_digests
from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.training.checkpoint import all_checkpoints
from tests.faults.forks import Job

# A start, and some steps, on a loaded machine of two cores.
LIMIT = 240.0


def command(inputs: dict[str, Path], folder: Path, *more: str) -> list[str]:
    """The arguments of a job that resumes, with a checkpoint every three steps."""
    return [
        f"model.restore_from_path={inputs['model']}",
        f"model.data.train={inputs['train']}",
        "model.data.validation=null",
        f"model.data.cache_dir={inputs['cache']}",
        f"exp_manager.explicit_log_dir={folder}",
        "exp_manager.resume_if_exists=true",
        "exp_manager.create_tensorboard_logger=false",
        "trainer.accelerator=cpu",
        "trainer.save_interval=3",
        "model.max_tokens_per_micro_batch=512",
        *more,
    ]


def wait_until(condition: Callable[[], object], job: Job, seconds: float = LIMIT) -> None:
    """Wait for a condition while the job runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert len(job.poll()) < len(job.ranks), job.output()
        assert time.monotonic() < end, job.output()
        time.sleep(0.005)


def finish(job: Job) -> None:
    """Let the job come to its end."""
    assert job.wait(LIMIT), job.output()
    assert not any(job.ends.values()), "\n".join(map(job.output, range(len(job.ranks))))


def last_step(folder: Path) -> int:
    """The last step that is in the metrics."""
    found = folder / "metrics.jsonl"
    lines = found.read_text().splitlines() if found.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max(all_checkpoints(folder / "checkpoints"), default=0)


def check_whole(folder: Path) -> int:
    """Check that whatever has a final name is whole. Returns the newest checkpoint's step."""
    checkpoints = all_checkpoints(folder / "checkpoints")
    for path in checkpoints.values():
        check_digests(path)
        CheckpointReader(path).check(0, 1)
    for exported in (folder / "hf", *(folder / "exports").glob("step_*")):
        if exported.is_dir():
            load_file(exported / "model.safetensors")
    return max(checkpoints, default=0)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Of the run's export."""
    return dict(load_file(folder / "hf" / "model.safetensors"))


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds of the parameters: their values, masters and moments."""
    reader = CheckpointReader(all_checkpoints(folder / "checkpoints")[newest(folder)])
    optimizer = StateReader(reader)
    names = [name for name in reader.names() if not name.startswith("optimizer.")]
    kinds = ("param", "exp_avg", "exp_avg_sq")
    moments = [f"optimizer.state.{kind}.{name}" for name in names for kind in kinds]
    return {name: reader.read(name) for name in names} | {
        name: optimizer.read_whole(name) for name in moments
    }


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """The exports and the newest checkpoints of two runs are the same to the last bit."""
    for read in (parameters, state):
        one, other = read(ours), read(theirs)
        assert one.keys() == other.keys()
        assert [name for name in other if not torch.equal(one[name], other[name])] == []
