"""The main job with an objective of your own, outside of the package: a hinge on pairs.

    torchrun --nproc-per-node 2 examples/own_objective.py model.mpo.objective=hinge model.mpo.delta=1 \\
        model.mpo.alpha=null [key=value ...]

A new objective is a function of whole groups. Its keyword-only parameters are its hyper-parameters: keys of `model.mpo`
whose ranges are checked, as they are of those in the package.
"""

import runpy
from pathlib import Path

from mpo_megatron.objectives.hyper import Positive
from mpo_megatron.objectives.pairwise import cross_pairs
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, register
from mpo_megatron.ragged.segments import segment_mean


@register(
    "hinge",
    contrasts="every preferred against every dispreferred response, to a margin of delta",
    source="Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, on log-ratios",
    settings="delta 1 (of log-probs)",
)
def hinge(batch: GroupBatch, *, beta: Positive, delta: Positive) -> ObjectiveResult:
    """max(0, delta - beta (r_w - r_l)), the mean over a group's (preferred, dispreferred) pairs."""
    rewards = beta * batch.log_ratios  # [R]
    better, worse = batch.index.both(rewards)  # [P] each, over all ordered pairs of one group
    losses = (delta - (better - worse)).clamp(min=0)
    return ObjectiveResult(segment_mean(losses, batch.index.pairs, cross_pairs(batch)), rewards.detach())


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("mpo_gpt.py")), run_name="__main__")
