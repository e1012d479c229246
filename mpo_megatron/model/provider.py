"""Build this rank's part of the model: configuration, layer spec, and GPTModel chunks for packed rows.

Nothing but this module and `conversion.names` knows Megatron's GPTModel, which Megatron-core 0.19 deprecates in favour
of HybridModel. A second model class would have to supply, beside its own table of names:

- chunks for (pipeline rank, virtual stage) from the same configuration, whose parameters are named
  `decoder.layers.N...` with each layer's own `layer_number`, and whose `sharded_state_dict` stacks the layers;
- a `forward` that takes a PackedRow, hands `RowParams` to every attention layer (`model.attention` computes from it)
  and the row's position ids to the rotary embedding, and returns the output layer's result untouched;
- an output layer that `model.head.ResponseHead` can take the place of: a vocabulary-parallel weight, its own or the
  embedding's;
- gradients finalised by Megatron's `finalize_model_grads`: tied embeddings and QK norms summed over their ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import Architecture
from mpo_megatron.model.attention import use_shared_prompts
from mpo_megatron.model.elementwise import gate
from mpo_megatron.model.fp8 import Fp8
from mpo_megatron.model.head import ResponseHead
from mpo_megatron.model.norm import RMSNorm
from mpo_megatron.model.rotary import PositionRotaryEmbedding
from mpo_megatron.model.segments import RowParams
from mpo_megatron.runtime import capabilities
from mpo_megatron.runtime.choices import layers_problem
from mpo_megatron.runtime.facts import Library
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.scheduling.pack import PackedRow


@dataclass(frozen=True)
class ModelOptions:
    """How the model is built and run, apart from its architecture and the parallel layout.

    Nothing in it is left to the machine: `uses_transformer_engine`, `choose_backend` and `choose_head` decide before.
    """

    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    transformer_engine: bool = False  # the layers come from Transformer Engine
    # Products of its layers and of the response head add weight gradients to the step's float32 sums themselves.
    fuse_weight_gradients: bool = True
    fp8: Fp8 | None = None  # of Transformer Engine's products; None: none
    attention_backend: str = "sdpa"  # te | varlen | sdpa
    head_backend: str = "eager"  # triton | eager
    make_vocab_size_divisible_by: int = 128
    head_chunk_size: int = 1024  # positions whose logits exist at a time
    recompute_granularity: str | None = None  # None | selective | full
    recompute_method: str | None = None  # uniform | block, for full
    recompute_num_layers: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None  # None: as many as the other stages
    num_layers_in_last_pipeline_stage: int | None = None


class GatedMLP(MLP):
    """Megatron's feed-forward layer, whose gate is computed in fewer passes over memory on a CPU."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [t, 1, H] and no bias."""
        if hidden_states.device.type != "cpu" or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        both, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(gate(both))


def _is_plain_swiglu(config: TransformerConfig) -> bool:
    """Whether feed-forward layers multiply silu of one half with the other, and nothing besides."""
    return (
        config.gated_linear_unit
        and config.activation_func is torch.nn.functional.silu
        and not config.add_bias_linear
        and not config.use_te_activation_func
        and getattr(config, "activation_func_clamp_value", None) is None
        and not getattr(config, "glu_linear_offset", 0.0)
    )


class GroupModel(GPTModel):
    """GPTModel whose input is a packed row and whose last stage returns log-probability sums."""

    @classmethod
    def take_over(
        cls,
        model: GPTModel,
        vocab_size: int,
        *,
        head_chunk_size: int = 1024,
        fuse_weight_gradients: bool = True,
        head_backend: str = "eager",
    ) -> "GroupModel":
        """Turn a GPTModel into a GroupModel, in place: same parameters, same names in checkpoints.

        Args:
            model: with rotary positions and a spec of `use_shared_prompts`, before it is wrapped.
            vocab_size: the vocabulary without padding.
            head_chunk_size: positions whose logits exist at a time.
            fuse_weight_gradients, head_backend: see `ResponseHead.take_over`.
        """
        assert model.position_embedding_type == "rope", model.position_embedding_type
        model.__class__ = cls
        for module in model.modules():
            if type(module) is MLP and _is_plain_swiglu(module.config):
                module.__class__ = GatedMLP
        rotary = model.rotary_pos_emb
        model._set_rotary(rotary.inv_freq.tolist(), rotary.inv_freq.device)
        if model.post_process:
            ResponseHead.take_over(
                model.output_layer, vocab_size, head_chunk_size, fuse_weight_gradients, head_backend
            )
        return model

    def _set_rotary(self, inverse_frequencies: Sequence[float], device: torch.device) -> None:
        in_attention = device.type == "cpu" and not self.config.apply_rope_fusion
        self.rotary_pos_emb = PositionRotaryEmbedding(inverse_frequencies, device, in_attention)

    def forward(self, row: PackedRow) -> Tensor:
        """Hidden states [t, 1, H] between pipeline stages; [1, R, 1] float32 log-probability sums from the last."""
        if self.post_process:
            self.output_layer.row = row
        return super().forward(
            row.tokens[None], row.position_ids[None], None, packed_seq_params=RowParams(row)
        )


def uses_transformer_engine(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Resolve `model.transformer_impl`: whether the layers come from Transformer Engine; `auto` takes it if it can run.

    Raises:
        ConfigError: it was asked for and cannot run.
    """
    if name == "local":
        return False
    problem = no_transformer_engine(device, dtype)
    if name == "transformer_engine" and problem is not None:
        raise ConfigError(
            f"model.transformer_impl=transformer_engine: {problem}; mend that, or set model.transformer_impl=auto"
        )
    return problem is None


def no_transformer_engine(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the layers cannot come from Transformer Engine; None: they can."""
    if device.type != "cuda":
        return layers_problem(False, False, Library("Transformer Engine"))
    sixteen_bits = dtype in (torch.bfloat16, torch.float16)
    return layers_problem(True, sixteen_bits, capabilities.transformer_engine())


def transformer_config(
    architecture: Architecture, layout: ParallelLayout, options: ModelOptions
) -> TransformerConfig:
    """Megatron's configuration of this model at this layout."""
    on_gpu = layout.device.type == "cuda"
    first, last = options.num_layers_in_first_pipeline_stage, options.num_layers_in_last_pipeline_stage
    if layout.pp == 2 and first is not None:
        # The first stage's says it all. Given both, Megatron divides by the number of stages between them to find the
        # layers of an interleaved chunk.
        last = None
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.block.qkv_bias,
        qk_layernorm=architecture.block.qk_norm,
        softmax_scale=architecture.softmax_scale,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        # With two stages the same two ranks send both ways at once, and batched sends and receives mix the ways up:
        # interleaving needs each on its own.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # Megatron's wait for the device after each transfer is for a bug of old versions of torch.
        batch_p2p_sync=False,
        # What has been sent is not read again: autograd needs its graph, not its values. Interleaved stages free it
        # with the send under way, which NCCL's streams order and Gloo's threads do not: gradients were wrong there.
        deallocate_pipeline_outputs=on_gpu or layout.vpp == 1,
        context_parallel_size=layout.cp,
        sequence_parallel=options.sequence_parallel,
        **_expert_options(architecture, layout, options),
        **_fp8_options(options.fp8),
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # every weight is read from the checkpoint
        bias_activation_fusion=on_gpu,
        # It is compiled anew for each length of rows, and without bias and dropout there is an addition to fuse.
        bias_dropout_fusion=False,
        apply_rope_fusion=options.transformer_engine,
        masked_softmax_fusion=False,
        # Megatron's own output layer would ask for apex; see _fuse_weight_gradients.
        gradient_accumulation_fusion=False,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        # The loss is a sum over groups and a count: Megatron divides once, by the count of the whole global batch.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )


def _fp8_options(fp8: Fp8 | None) -> dict[str, Any]:
    """Of Megatron's configuration, what 8-bit products need."""
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "first_last_layers_bf16": fp8.first_bf16 > 0 or fp8.last_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_bf16,
        "num_layers_at_end_in_bf16": fp8.last_bf16,
    }


def _expert_options(
    architecture: Architecture, layout: ParallelLayout, options: ModelOptions
) -> dict[str, Any]:
    """Of Megatron's configuration, what a mixture of experts needs: every token reaches all of its experts.

    No auxiliary loss: it would balance the experts' load in place of the preferences' own gradient, and transformers
    computes none either unless a config asks for `output_router_logits`.
    """
    experts = architecture.experts
    if experts is None:
        return {}
    if not hasattr(moe_utils, "te_general_gemm"):
        # Megatron-core 0.16 leaves the name out where Transformer Engine is absent, and its router then asks for it.
        moe_utils.te_general_gemm = None
    return {
        "num_moe_experts": experts.number,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp64" if options.dtype == torch.float64 else "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": layout.ep,
    }


def layer_spec(architecture: Architecture, options: ModelOptions) -> ModuleSpec:
    """Megatron's layer spec with shared-prompt attention in it."""
    qk_norm = architecture.block.qk_norm
    experts = architecture.experts.number if architecture.experts is not None else None
    if options.transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=experts, qk_layernorm=qk_norm)
    else:
        spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=qk_norm)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        if experts is not None:
            # Transformer Engine's spec leaves this norm its own name before experts, and Megatron's local one does not:
            # checkpoints have one form under both.
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        if qk_norm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return use_shared_prompts(spec, options.attention_backend)


def build_model(
    architecture: Architecture, layout: ParallelLayout, options: ModelOptions
) -> list[torch.nn.Module]:
    """This rank's model chunks (one for each of its virtual pipeline stages), weights not yet filled.

    In bf16 they are wrapped in Megatron's Float16Module.
    """
    config = transformer_config(architecture, layout, options)
    return [_build_chunk(config, architecture, layout, options, stage) for stage in range(layout.vpp)]


def _build_chunk(
    config: TransformerConfig,
    architecture: Architecture,
    layout: ParallelLayout,
    options: ModelOptions,
    virtual_stage: int,
) -> torch.nn.Module:
    spec = layer_spec(architecture, options)
    vp_stage = virtual_stage if layout.vpp > 1 else None
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    block: Any = spec
    if not options.transformer_engine:
        block = TransformerBlockSubmodules([spec] * num_layers, layer_norm=RMSNorm)
    model = GPTModel(
        config,
        block,
        vocab_size=architecture.padded_vocab_size(options.make_vocab_size_divisible_by, layout.tp),
        max_sequence_length=architecture.max_positions,
        pre_process=layout.pp_rank == 0 and virtual_stage == 0,
        post_process=layout.is_last_stage and virtual_stage == layout.vpp - 1,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    model = GroupModel.take_over(
        model,
        architecture.vocab_size,
        head_chunk_size=options.head_chunk_size,
        fuse_weight_gradients=options.fuse_weight_gradients,
        head_backend=options.head_backend,
    )
    model._set_rotary(architecture.inverse_frequencies, layout.device)
    _mark_tensor_parallel(model)
    _mark_experts(model)
    if options.transformer_engine and options.fuse_weight_gradients:
        _fuse_weight_gradients(model)
    if layout.device.type == "cuda":
        model.cuda(layout.device)
    return Float16Module(config, model) if config.bf16 else model


def _fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's linear layers add their weight gradients to `main_grad` in the product itself.

    They do so where Megatron's configuration has `gradient_accumulation_fusion`, and need no apex for it; but with that
    the output layer would stop for lack of apex.
    """
    name = "fuse_wgrad_accumulation"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, True)


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark which weights are cut over tensor-parallel ranks; the gradient norm counts the others on one rank only.

    Megatron-core 0.16 leaves the marks out where it does not initialise the weights; biases it marks always.
    """
    partitioned = (
        (tensor_parallel.ColumnParallelLinear, 0),
        (tensor_parallel.RowParallelLinear, 1),
        (tensor_parallel.VocabParallelEmbedding, 0),
    )
    for module in model.modules():
        for kind, dim in partitioned:
            weight = getattr(module, "weight", None)
            if (
                isinstance(module, kind)
                and weight is not None
                and not hasattr(weight, "tensor_model_parallel")
            ):
                tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)


def _mark_experts(model: torch.nn.Module) -> None:
    """Mark the experts' weights as such also where no other rank shares the experts, as Megatron does where one does.

    Their gradients and optimizer state then have groups and buffers of their own at every layout, and with them
    checkpoints one form.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False


def unwrap(module: Any) -> GroupModel:
    """The GroupModel inside Megatron's wrappers (distributed data parallel, Float16Module)."""
    while not isinstance(module, GroupModel):
        module = module.module
    return module
