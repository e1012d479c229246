"""One training run of the main job, and what it changed on held-out groups: for the comparison of master weights.

As a module of its own, `python -m mpo_megatron.benchmarks.masters RUN` is the process of one run: RUN is the JSON of a
`Run`, and the last line printed is that of what was found. tools/compare_masters.py starts these.
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.config.groups import CONF, compose_config
from mpo_megatron.errors import UserError
from mpo_megatron.model.provider import unwrap
from mpo_megatron.objectives import GroupBatch
from mpo_megatron.objectives.metrics import METRICS, group_metrics
from mpo_megatron.ragged.groups import GroupIndex
from mpo_megatron.training.job import Job, build_job, start_masters
from mpo_megatron.training.setup import prepare
from mpo_megatron.training.step import response_logps
from mpo_megatron.training.trainer import train_step


@dataclass(frozen=True)
class Run:
    """A run of the main job on this process alone.

    Attributes:
        overrides: of conf/mpo_gpt.yaml.
        stochastic: make the bf16 weights of the masters by stochastic rounding, after every step.
        threads: of torch.
    """

    overrides: list[str]
    stochastic: bool
    threads: int


def stochastic_rounding(masters: Tensor, random: torch.Generator) -> Tensor:
    """bf16 numbers whose expectation is the float32 masters: each is rounded up with the probability of its remainder.

    A random number of 16 bits is added to the lower half of the float32 number, which is then cut off.
    """
    offsets = torch.randint(0, 1 << 16, masters.shape, dtype=torch.int32, generator=random)
    bits = masters.contiguous().view(torch.int32) + offsets
    return (bits & ~0xFFFF).view(torch.float32).bfloat16()


def run(wanted: Run) -> dict[str, float]:
    """Train, and compare with the reference on the validation groups.

    Returns:
        METRICS on the validation groups, `distance` (root mean square of the responses' log-ratios, in nats), `moved`
        (part of the weights that are others than at the start).
    """
    torch.set_num_threads(wanted.threads)
    job = _build(wanted.overrides)
    start_masters(job)
    parameters = [parameter for chunk in job.chunks for parameter in unwrap(chunk).parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    random = torch.Generator().manual_seed(job.setup.config.trainer.seed)
    with job.setup.train.source.steps(job.setup.train.steps) as steps:
        for step in range(1, job.total_steps + 1):
            train_step(job, step, steps)
            if wanted.stochastic:
                for parameter in parameters:
                    parameter.data.copy_(stochastic_rounding(parameter.main_param, random))
    moved = sum(int((now != then).sum()) for now, then in zip(parameters, before, strict=True))
    return {
        **_held_out(job),
        "moved": moved / sum(parameter.numel() for parameter in parameters),
    }


def _build(overrides: list[str]) -> Job:
    return build_job(prepare(compose_config(CONF / "mpo_gpt.yaml", overrides)))


def _held_out(job: Job) -> dict[str, float]:
    """Metrics of the validation groups under the present weights, in one pass."""
    split, layout = job.setup.validation, job.setup.layout
    assert split is not None
    for chunk in job.chunks:
        chunk.eval()
    size, references = int(split.dataset.response_offsets[-1]), job.references["validation"]
    with split.source.steps(split.steps) as steps:
        logps = response_logps(job.chunks, steps, size, layout)
    numbers = np.concatenate(split.steps)
    groups = [split.dataset.group(int(number)) for number in numbers]
    responses = [len(group.response_ids) for group in groups]
    offsets = split.dataset.response_offsets
    ids = torch.tensor(
        [int(offsets[n]) + k for n, r in zip(numbers, responses, strict=True) for k in range(r)]
    )
    batch = GroupBatch(
        policy_logps=logps[ids],
        reference_logps=references[ids],
        lengths=torch.tensor([len(response) for group in groups for response in group.response_ids]),
        scores=torch.tensor(np.concatenate([group.scores for group in groups]), dtype=logps.dtype),
        preferred=torch.tensor(np.concatenate([group.preferred for group in groups])),
        response_ids=ids,
        index=GroupIndex.of(responses),
    )
    means = group_metrics(batch, job.setup.objective(batch)).mean(1).tolist()
    distance = float(batch.log_ratios.square().mean().sqrt())
    return {**dict(zip(METRICS, means, strict=True)), "distance": distance}


def as_argument(wanted: Run) -> str:
    """The one argument of this module as a program."""
    return json.dumps(asdict(wanted))


def main(arguments: list[Any]) -> None:
    """Run the run that the one argument describes."""
    print(json.dumps(run(Run(**json.loads(arguments[0])))), flush=True)


if __name__ == "__main__":
    from mpo_megatron.runtime.quiet import quiet_third_parties

    quiet_third_parties()
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
