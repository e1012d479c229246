"""From a run's configuration to what the planner needs of it."""

from mpo_megatron.config import Config
from mpo_megatron.planning.run import Recompute, Run

_ELEMENT = {"bf16": 2, "32": 4}


def run_of(
    config: Config,
    *,
    dp: int,
    transformer_engine: bool,
    fused: bool,
    attention: str,
    token_multiple: int,
    two_passes: bool,
) -> Run:
    """The run that a configuration describes, over `dp` data-parallel ranks.

    Args:
        transformer_engine, fused, attention, token_multiple, two_passes: as in Run: what a configuration leaves to the
            machine and the objective.
    """
    model = config.model
    overlap_grad_reduce, overlap_param_gather = model.optim.overlap(fused)
    return Run(
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        vpp=model.virtual_pipeline_model_parallel_size or 1,
        cp=model.context_parallel_size,
        dp=dp,
        ep=model.expert_model_parallel_size,
        sequence_parallel=config.sequence_parallel,
        first_stage=model.num_layers_in_first_pipeline_stage,
        last_stage=model.num_layers_in_last_pipeline_stage,
        recompute=Recompute(
            model.activations_checkpoint_granularity,
            model.activations_checkpoint_method,
            model.activations_checkpoint_num_layers,
        ),
        element=_ELEMENT[config.precision],
        fp8=model.fp8 is not None,
        transformer_engine=transformer_engine,
        fused=fused,
        attention=attention,
        distributed_optimizer=model.optim.distributed,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        vocab_multiple=model.make_vocab_size_divisible_by,
        head_chunk=model.head_chunk_size,
        token_multiple=token_multiple,
        max_tokens=model.max_tokens_per_micro_batch,
        shared_prompt=model.pack.shared_prompt,
        two_passes=two_passes,
    )
