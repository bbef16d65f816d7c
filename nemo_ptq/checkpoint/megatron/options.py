# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which of Megatron's options change what a model computes: those that are read, and those that are refused.

The options are those of Megatron-Core's TransformerConfig and GPTModel, under the names that Megatron-LM's arguments
and Megatron-Bridge's providers have for them. An option with an unknown effect is refused by name.
"""

from collections.abc import Collection, Mapping
from typing import Any

from nemo_ptq.errors import PtqError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "add_position_embedding": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "attn_logit_softcapping": (None,),
    "experimental_attention_variant": (None,),
    "final_logit_softcapping": (None,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "interleaved_attn_pattern": (None,),
    "is_hybrid_model": (False,),
    "linear_attention_freq": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_force_biased": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_group_topk": (None,),
    "moe_router_load_balancing_type": (
        *("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
        *(["aux_loss"], ["seq_aux_loss"], ["global_aux_loss"], ["none"]),
    ),
    "moe_router_num_groups": (None,),
    "moe_router_pre_softmax": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_gate": (False,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_single_grouped_bias": (False,),
    "moe_token_dropping": (False,),
    "mrope_section": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "query_pre_attn_scalar": (None,),
    "quick_geglu": (False,),
    "retro_add_retriever": (False,),
    "rope_type": (None, "rope"),
    "rotary_interleaved": (False,),
    "scale_embeddings_by_hidden_size": (False,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "spec": (None,),
    "use_mup": (False,),
    "vision_pretraining": (False,),
    "window_attn_skip_freq": (None,),
}
"""Options that change the computation unless they have one of these values."""

_KERNELS = (
    *("activation_func_fp8_input_store", "apply_query_key_layer_scaling", "apply_rope_fusion", "attention_backend"),
    *("attention_softmax_in_fp32", "batch_invariant_mode", "bias_activation_fusion", "bias_dropout_fusion"),
    *("bias_dropout_add_fusion",),
    *("clone_scatter_output_in_embedding", "config_logger_dir", "cp_comm_type", "deterministic_mode"),
    *("disable_bf16_reduced_precision_matmul", "disable_parameter_transpose_cache", "dsa_kernel_backend"),
    *("enable_autocast", "autocast_dtype", "enable_cuda_graph", "external_cuda_graph", "flash_attention_version"),
    *("flash_decode", "fp16_lm_cross_entropy", "fp32_residual_connection", "fused_residual_rmsnorm"),
    *("fused_single_qkv_rope", "kitchen_attention_backend", "log_max_attention_logit", "logit_dtype"),
    *("masked_softmax_fusion", "memory_efficient_layer_norm", "mla_down_proj_fusion", "persist_layer_norm"),
    *("symmetric_ar_type", "test_mode", "transformer_impl", "transformer_layer_spec", "use_kitchen"),
    *("use_arbitrary_attention_mask", "use_fused_weighted_squared_relu", "use_grouped_gemm_for_dense_mlp"),
    *("use_grouped_gemm_for_shared_expert", "use_inference_optimized_layers", "use_kitchen_attention"),
    *("use_mamba_mem_eff_path", "use_te_activation_func", "use_te_rng_tracker", "use_transformer_engine_op_fuser"),
    *("use_transformer_engine_full_layer_spec", "dense_grouped_gemm", "cross_entropy_fusion_impl"),
    *("cross_entropy_loss_fusion", "first_last_layers_bf16", "num_layers_at_end_in_bf16", "quant_recipe"),
    *("num_layers_at_start_in_bf16", "tp_only_amax_red", "fp8", "fp4", "fp16", "bf16", "params_dtype"),
)
# Options of layers that other, refused options would have to enable.
_OF_OTHER_LAYERS = (
    *("beta_fast", "beta_slow", "cache_mla_latents", "kv_lora_rank", "linear_conv_kernel_dim", "linear_key_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "mscale", "mscale_all_dim"),
    *("mtp_enabled", "original_max_position_embeddings", "q_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"),
    *("relative_attention_max_distance", "relative_attention_num_buckets", "rotary_scaling_factor", "v_head_dim"),
    *("mamba_head_dim", "mamba_num_groups", "mamba_num_heads", "mamba_state_dim", "vision_backbone_type"),
    *("vision_pretraining_type", "bert_binary_head", "bert_embedder_type", "moe_router_quantile_balancing_ema"),
)
_TRAINING = (
    *("apply_wd_to_qk_layernorm", "attention_dropout", "calculate_per_token_loss", "hidden_dropout"),
    *("moe_aux_loss_coeff", "moe_enable_routing_replay", "moe_input_jitter_eps", "moe_router_bias_update_rate"),
    *("moe_router_dtype", "moe_router_padding_for_fp8", "moe_router_padding_for_quantization", "moe_z_loss_coeff"),
    *("moe_upcycling_granularity", "mtp_detach_heads", "mtp_loss_scaling_factor", "mtp_use_repeated_layer"),
    *("qk_clip", "qk_clip_alpha", "qk_clip_threshold", "mup_width_mult", "mup_embedding_mult", "mup_output_mult"),
    *("mup_attn_scale_power", "mup_base_head_dim", "mup_base_hidden_size", "restore_modelopt_state"),
    *("embedding_path", "num_dataset_builder_threads", "num_layers_per_virtual_pipeline_stage"),
)
# How work and memory are distributed, and which kernels a mixture of experts uses.
_PARALLEL = (
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "async_tensor_model"),
    *("deallocate_pipeline_outputs", "defer_embedding_wgrad_compute", "distribute_saved_activations"),
    *("gradient_accumulation_fusion", "hybrid_context_parallel", "hybrid_rank_overlap", "hybrid_attention_ratio"),
    *("hybrid_mlp_ratio", "make_vocab_size_divisible_by", "moe_enable_deepep", "moe_flex_dispatcher_backend"),
    *("moe_grouped_gemm", "moe_layer_recompute", "moe_pad_expert_input_to_capacity", "moe_per_layer_logging"),
    *("moe_pad_experts_for_cuda_graph_inference", "moe_permute_fusion", "moe_permute_fusion_into_hybridep"),
    *("moe_router_fusion", "moe_shared_expert_overlap", "moe_single_grouped_weight", "moe_token_dispatcher_type"),
    *("moe_token_drop_policy", "moe_use_legacy_grouped_gemm", "moe_use_upcycling", "num_distributed_optimizer"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "num_microbatches_with_partial"),
    *("parallel_output", "perform_initialization", "scatter_embedding_sequence_parallel", "sequence_parallel"),
    *("should_pad_vocab", "timers", "use_cpu_initialization", "use_ring_exchange_p2p", "wgrad_deferral_limit"),
    *("hf_model_id", "hf_model_revision", "generation_config", "hetereogenous_dist_checkpoint", "variable_seq"),
    *("delay_wgrad_compute", "barrier_with_L1_time", "batch_p2p", "num_virtual_stages_per_pipeline_rank"),
    *("high_priority_a2a_comm_stream", "mlp_chunks_for", "finalize_model_grads_func", "max_seqlen_per"),
    *("min_offloaded_tensor_size", "no_sync_func", "param_sync_func", "grad_sync_func", "grad_scale_func"),
    *("ep_overlap_early_attn_memory_release", "use_layer_wise_param_layout", "nccl_", "tensor_parallel_num"),
    *("gtp_", "hierarchical_context_parallel", "moe_extended_tp", "moe_grad_scale_func", "mtp_grad_scale_func"),
)
_HARMLESS_BEGINNINGS = (
    *("_", "context_parallel", "cpu_offloading", "cuda_graph", "dsa_indexer_", "embedding_init_method", "expert_"),
    *("fine_grained_", "fp4_", "fp8_", "inference_", "init_m", "microbatch_group", "moe_deepep_", "moe_hybridep_"),
    *("moe_flex_dispatcher_num_sms", "moe_ncclep_", "moe_paged_stash", "offload_", "output_layer_init_method"),
    *("overlap_", "pipeline_", "recompute_", "tensor_model", "tp_comm_", "virtual_pipeline", "yarn_", "logits_"),
    *("mamba_inference_", "mamba_training_", "activation_offload_", "delay_offload_", "delta_offload_"),
    *("experimental_attention_variant_loss_scale_func", "mtp_hybrid_override_pattern", "mtp_standalone"),
)
HARMLESS = frozenset((*_KERNELS, *_OF_OTHER_LAYERS, *_TRAINING))
"""Options that do not change the trained model's computation, whatever their value."""
# What an option is about that a later version of Megatron adds to the model, by the beginnings of their names.
_OF_THE_MODEL = (
    *(
        "activation_",
        "apply_",
        "attention_",
        "attn_",
        "dsa_",
        "embedding_",
        "experimental_attention",
        "final_",
        "gated_",
    ),
    *("glu_", "hetereogen", "heterogen", "hybrid_", "kv_", "layernorm_", "linear_", "logit_", "mamba_", "mla_", "moe_"),
    *("mrope_", "mtp_", "multi_", "mup_", "no_rope", "norm", "position_", "q_lora", "qk_", "quick_", "residual_"),
    *("rope_", "rotary_", "router_", "shared_expert", "sliding_", "softcap", "softmax_", "swiglu", "v_head", "window_"),
)
# Values of an option that asks for nothing.
_NOTHING: tuple[Any, ...] = (None, False, "", [], {}, ())
_SHOWN = 60


def check_options(where: str, options: Mapping[str, Any], read: Collection[str], only_the_model: bool) -> None:
    """Refuses options that may change what a model computes, and that nothing here reads.

    Args:
        where: The file, for messages.
        options: Their values by name.
        read: The names of those that are read.
        only_the_model: Whether all of them are about the model, as in Megatron-Bridge's section of that name; if not,
            they are those of a training job, and a name that is not known is taken for one of the model's by its
            beginning.

    Raises:
        PtqError: If there are any.
    """
    refused = [
        f"{name} {_shown(value)}"
        for name, value in sorted(options.items())
        if name not in read and _may_change(name, value, only_the_model)
    ]
    if refused:
        raise PtqError(
            f"{where} has {', '.join(refused)}, which changes what the model computes, or is not known: such models "
            "cannot be read"
        )


def _may_change(name: str, value: Any, only_the_model: bool) -> bool:
    if name in NEUTRAL:
        return not any(_same(value, neutral) for neutral in NEUTRAL[name])
    if name in HARMLESS or name.startswith((*_PARALLEL, *_HARMLESS_BEGINNINGS)):
        return False
    if not only_the_model and not name.startswith(_OF_THE_MODEL):
        return False
    return not any(_same(value, nothing) for nothing in _NOTHING)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, bool) != isinstance(other, bool):
        return False
    value = list(value) if isinstance(value, tuple) else value
    return bool(value == other)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
