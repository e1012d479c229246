"""MPO inside a Megatron-core training loop of your own: the planner, the model's parts, the head and the forward step.

    torchrun --nproc-per-node 4 examples/plug_into_megatron.py --tp 2 --cp 2

What is not imported from mpo_megatron is plain Megatron-core. The data are random groups; longer responses score
higher.
"""

import argparse
from functools import partial

import numpy as np
import torch
from megatron.core import distributed, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from mpo_megatron.data import GroupList, TokenizedGroup
from mpo_megatron.model.attention import choose_backend, use_shared_prompts
from mpo_megatron.model.provider import GroupModel
from mpo_megatron.objectives.mpo import mpo
from mpo_megatron.runtime.device import choose_device
from mpo_megatron.runtime.parallel import initialize
from mpo_megatron.scheduling.plan import CostModel, Pipeline
from mpo_megatron.scheduling.rows import RowSource
from mpo_megatron.training.step import first_pass, forward_step, mean_metrics, objective_loss, response_logps

VOCAB, STEPS = 256, 10


def random_group(number: int) -> TokenizedGroup:
    """A prompt with two to five responses, whose scores grow with their lengths."""
    random = np.random.default_rng(number)
    responses = [random.integers(0, VOCAB, length) for length in random.integers(4, 60, 2 + number % 4)]
    scores = np.array([len(response) + 0.1 * k for k, response in enumerate(responses)])
    prompt = random.integers(0, VOCAB, 20)
    return TokenizedGroup(str(number), prompt, responses, scores, scores > scores.mean())


def main(tp: int = 1, pp: int = 1, cp: int = 1) -> list[float]:
    device = choose_device("auto")
    layout = initialize(device, tp=tp, pp=pp, cp=cp)  # or current_layout(device), in a loop that has groups
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=device.type == "cpu",
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
        pipeline_dtype=torch.float32, finalize_model_grads_func=distributed.finalize_model_grads,
        calculate_per_token_loss=True,  # the loss comes as (sum over groups, number of groups)
    )  # fmt: skip

    # The model: shared-prompt attention in the layers, then the positions and the head of packed rows.
    spec = use_shared_prompts(get_gpt_layer_local_spec(), choose_backend("auto", device, torch.float32))
    gpt = GPTModel(
        config, spec, VOCAB, 512, pre_process=layout.pp_rank == 0, post_process=layout.is_last_stage,
        position_embedding_type="rope",
    )  # fmt: skip
    model = GroupModel.take_over(gpt, VOCAB).to(device)
    ddp_config = distributed.DistributedDataParallelConfig()
    chunks = [distributed.DistributedDataParallel(config, ddp_config, model)]
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0), chunks)

    # The scheduler: groups to rows of at most 160 tokens. Larger groups are cut and run in two passes, exactly.
    groups = GroupList([random_group(number) for number in range(16)])
    source = RowSource(
        groups, max_tokens=160, alignment=8 * tp * cp, cost=CostModel(1e6, 1e3, 1e5),
        data_parallel=(layout.dp, layout.dp_rank), context=(cp, layout.cp_rank), pipeline=Pipeline(pp), device=device,
    )  # fmt: skip
    rows = source.step(range(len(groups)))
    reference = response_logps(chunks, [rows], int(groups.response_offsets[-1]), layout)  # before training
    objective, losses = partial(mpo, beta=0.1), []

    for step in range(1, STEPS + 1):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        split = first_pass(chunks, rows, objective, reference, layout)  # None if every group fits a row
        kept = get_forward_backward_func()(
            forward_step_func=forward_step(objective_loss(objective, reference, split)),
            data_iterator=rows.iterators(1)[0], model=chunks, num_microbatches=len(rows.rows),
            seq_length=rows.longest_row, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        metrics = mean_metrics(kept, split, rows, layout)
        losses.append(metrics["loss"])
        if layout.is_main:
            print(f"step {step}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for dimension in ("--tp", "--pp", "--cp"):
        parser.add_argument(dimension, type=int, default=1)
    main(**vars(parser.parse_args()))
