"""FLOPs of a step, from the cost model that the scheduler balances rows by.

Convention: a multiply-add counts 2; matrix products alone count; attention counts the query-key pairs that its mask
leaves, which is what kernels for variable lengths compute (rounded up to their tiles). A backward pass is two forward
passes. These **model FLOPs** are what MFU is of (Chowdhery et al. 2022, appendix B): padding, recomputation and the
first pass of split groups are not in them.

**Computed FLOPs** are what runs: padding through the layers; of attention's backward pass five products where the
forward pass has two (Dao 2023, arXiv 2307.08691: scores are computed again); the head's logits again in its backward
pass; recomputed layers or scores; and first passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpo_megatron.model.architecture import Architecture
from mpo_megatron.planning.profile import RowShape, StepShape
from mpo_megatron.planning.run import Run
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.plan import CostModel

BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5
HEAD_BACKWARD = 3.0


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step on all ranks together.

    Attributes:
        shared: model FLOPs with each prompt stored once.
        repeated: the same groups with a prompt for each response.
        computed: what runs, as the run has it.
    """

    shared: float
    repeated: float
    computed: float

    def model(self, shared_prompt: bool) -> float:
        """Model FLOPs of a run that shares prompts, or does not."""
        return self.shared if shared_prompt else self.repeated


def step_flops(a: Architecture, run: Run, shape: StepShape) -> StepFlops:
    """FLOPs of a step of these rows."""
    return StepFlops(
        model_flops(a.cost_model, shape.groups, shared_prompt=True),
        model_flops(a.cost_model, shape.groups, shared_prompt=False),
        sum(
            times * sum(row_flops(a, run, part) + twice * forward_flops(a.cost_model, part) for part in row)
            for rank in shape.counted
            for (row, twice), times in rank.items()
        ),
    )


def model_flops(cost: CostModel, groups: Sequence[GroupLengths], shared_prompt: bool) -> float:
    """Forward and backward of these groups, padding left out."""
    return (1 + BACKWARD) * sum(cost.of(group, shared_prompt) for group in groups)


def forward_flops(cost: CostModel, row: RowShape) -> float:
    """A forward pass over what a context-parallel rank holds of a row, padding included."""
    return cost.forward(row.tokens, row.pairs, row.predicted)


def row_flops(a: Architecture, run: Run, row: RowShape) -> float:
    """Computed FLOPs of forward and backward over what a context-parallel rank holds of a row, on all its tensor- and
    pipeline-parallel ranks.
    """
    cost = a.cost_model
    chunks = [layers for stage in range(run.pp) for layers in run.chunks(a.num_layers, stage)]
    again = sum(run.recompute.layers(layers) for layers in chunks) / a.num_layers
    scores_again = 1.0 if run.recompute.granularity == "selective" else again
    return (
        cost.forward(row.tokens, 0, 0) * (1 + BACKWARD + again)
        + cost.forward(0, row.pairs, 0) * (1 + ATTENTION_BACKWARD + scores_again)
        + cost.forward(0, 0, row.predicted) * (1 + HEAD_BACKWARD)
    )
