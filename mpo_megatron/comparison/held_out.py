"""What a run has changed on the held-out groups, each by itself, in units that are the same for all objectives.

The log-ratio of a response is its log-prob under the trained model less that under the starting model, in nats, as the
run's own first and last validations have them; so it is there for objectives without a reference, too. For DPO, MPO and
all whose implicit reward is beta times the log-ratio, its accuracy is theirs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_megatron.errors import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """Of the G held-out groups that have both preferred and dispreferred responses.

    Attributes:
        ids: of the groups.
        accuracy: [G] part of the (preferred, dispreferred) pairs whose log-ratios are in that order; a tie counts half.
        margin: [G] mean log-ratio of the preferred less that of the dispreferred responses, nats.
        divergence: log-prob lost by all responses, over their tokens: nats a token. Of responses that were sampled from
            the starting model at temperature 1 it estimates KL(starting model || trained model), a token's.
    """

    ids: list[str]
    accuracy: Floats
    margin: Floats
    divergence: float


def read_held_out(folder: Path) -> HeldOut:
    """Of a run's first and last validation.

    Args:
        folder: of its experiment.

    Raises:
        UserError: it has not written the responses of two validations of the same groups.
    """
    files = sorted((folder / "validation").glob("step_*.jsonl"))
    if len(files) < 2:
        raise UserError(
            f"{folder / 'validation'} has {len(files)} validations, and a comparison needs one before and one after "
            "training; leave trainer.log_val_groups as it is"
        )
    before, after = (_lines(path) for path in (files[0], files[-1]))
    if [line["id"] for line in before] != [line["id"] for line in after]:
        raise UserError(
            f"{files[0]} and {files[-1].name} are of other groups; remove the run's folder to run it anew"
        )
    ratios = [np.subtract(last["logps"], first["logps"]) for first, last in zip(before, after, strict=True)]
    preferred = [np.array(line["preferred"]) for line in after]
    tokens = sum(sum(line["tokens"]) for line in after)
    return HeldOut(
        [line["id"] for line in after],
        np.array([_accuracy(of, mask) for of, mask in zip(ratios, preferred, strict=True)]),
        np.array([of[mask].mean() - of[~mask].mean() for of, mask in zip(ratios, preferred, strict=True)]),
        -float(np.concatenate(ratios).sum()) / tokens,
    )


def _accuracy(ratios: Floats, preferred: NDArray[np.bool_]) -> float:
    return float((0.5 * (1 + np.sign(ratios[preferred][:, None] - ratios[~preferred]))).mean())


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if 0 < sum(line["preferred"]) < len(line["preferred"])]
