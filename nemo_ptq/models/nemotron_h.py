# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H and Nemotron Nano v2: hybrids of Mamba-2, attention and MLPs with a squared ReLU, without positions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.hf_settings import check_size, shown
from nemo_ptq.models.hugging_face import NEMO, HuggingFaceClass, Settings
from nemo_ptq.models.mapping import EMBEDDING, QKV, WeightRule, with_bias, without_bias
from nemo_ptq.models.registry import Family
from nemo_ptq.models.state_space import ATTENTION, CONV_KERNEL, MLP, STATE_PARAMETERS, STATE_SPACE

_LAYER = "backbone.layers.{layer}."
_MIXER = _LAYER + "mixer"
# Names of the layers in transformers 5; its first versions have the second ones.
_KINDS = {
    **{"linear_attention": STATE_SPACE, "full_attention": ATTENTION, "mlp": MLP},
    **{"mamba": STATE_SPACE, "attention": ATTENTION},
}
_SIZES = ("ssm_state_size", "mamba_num_heads", "mamba_head_dim", "n_groups")
# Time steps without an upper limit, as it is published (which is no JSON), and as transformers 5 writes it.
_UNLIMITED = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])


def with_pattern(content: Settings) -> dict[str, Any]:
    """Returns the settings of a config.json with the kinds of layers as older files have them, in one string.

    Raises:
        PtqError: If there is a layer of another kind.
    """
    settings = dict(content)
    names = settings.pop("layers_block_type", None) or settings.pop("layer_types", None)
    if names is not None and "hybrid_override_pattern" not in settings:
        if not isinstance(names, Sequence) or not all(name in _KINDS for name in names):
            raise PtqError(
                f"config.json has layers_block_type {shown(names)}: each must be one of {', '.join(_KINDS)}; layers "
                "with experts are not supported"
            )
        settings["hybrid_override_pattern"] = "".join(_KINDS[name] for name in names)
    pattern = settings.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        settings.setdefault("num_hidden_layers", len(pattern))
    return settings


def _nemo_config(settings: Settings) -> tuple[str, dict[str, Any]]:
    for name in _SIZES:
        check_size(name, settings[name])
    return "NemotronHConfigBase", {
        "hybrid_override_pattern": settings["hybrid_override_pattern"],
        "mamba_state_dim": settings["ssm_state_size"],
        "mamba_num_heads": settings["mamba_num_heads"],
        "mamba_head_dim": settings["mamba_head_dim"],
        "mamba_num_groups": settings["n_groups"],
        "vocab_size": settings["vocab_size"],  # NeMo's class has one of its own
        "kv_channels": settings.get("head_dim") or settings.get("attention_head_dim") or 128,
    }


def _hf_settings(nemo: Any) -> dict[str, Any]:
    heads = nemo.mamba_num_heads or 2 * nemo.hidden_size // nemo.mamba_head_dim
    return {
        "hybrid_override_pattern": nemo.hybrid_override_pattern,
        "ssm_state_size": nemo.mamba_state_dim,
        "mamba_num_heads": heads,
        "mamba_head_dim": nemo.mamba_head_dim,
        "n_groups": nemo.mamba_num_groups,
        "attention_head_dim": nemo.kv_channels,
        "rms_norm_eps": nemo.layernorm_epsilon,
        "chunk_size": 128,
    }


def _norm_before(module: str) -> tuple[WeightRule]:
    """Each layer has one norm, which NeMo keeps with the linear layer that it enters."""
    return without_bias(f"decoder.layers.{module}.layer_norm_", _LAYER + "norm")


_ROWS: Mapping[str, Sequence[str]] = {"in_proj": ("z", "x", "B", "C", "dt"), "conv1d": ("x", "B", "C")}
NEMOTRON_H = HuggingFaceClass(
    architecture="NemotronHForCausalLM",
    config_class="NemotronHConfig",
    model_type="nemotron_h",
    nemo_model=NEMO + "ssm.MambaModel",
    nemo_config=_nemo_config,
    nemo_settings=_hf_settings,
    nemo_fixed={
        "normalization": "RMSNorm",
        "activation_func": "squared_relu",
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "position_embedding_type": "none",
    },
    defaults={
        **{"vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False},
        **{"ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4},
        **{"initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2"},
        **{"mamba_hidden_act": "silu", "use_bias": False, "mlp_bias": False, "attention_bias": False},
        **{"mamba_proj_bias": False, "use_conv_bias": True, "residual_in_fp32": False, "time_step_limit": None},
    },
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "init_method_std": "initializer_range",
        "layernorm_epsilon": "layer_norm_epsilon",
        "seq_length": "max_position_embeddings",
    },
    fixed={
        **{"mlp_hidden_act": ("relu2",), "mamba_hidden_act": ("silu",), "conv_kernel": (CONV_KERNEL,)},
        # Megatron's gated norm has this epsilon whatever that of the other norms is.
        "layer_norm_epsilon": (1e-5,),
        **dict.fromkeys(("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias", "residual_in_fp32"), (False,)),
        **{"use_conv_bias": (True,), "sliding_window": (None,), "time_step_limit": _UNLIMITED},
    },
    rules=(
        WeightRule(f"{EMBEDDING}.weight", {"": "backbone.embeddings.weight"}),
        *_norm_before("mixer.in_proj"),
        *without_bias("decoder.layers.mixer.in_proj.", dict.fromkeys(_ROWS["in_proj"], f"{_MIXER}.in_proj")),
        *with_bias("decoder.layers.mixer.conv1d.", dict.fromkeys(_ROWS["conv1d"], f"{_MIXER}.conv1d")),
        *(WeightRule(f"decoder.layers.mixer.{name}", {"": f"{_MIXER}.{name}"}) for name in STATE_PARAMETERS),
        *without_bias("decoder.layers.mixer.norm.", f"{_MIXER}.norm"),
        *without_bias("decoder.layers.mixer.out_proj.", f"{_MIXER}.out_proj"),
        *_norm_before("self_attention.linear_qkv"),
        *without_bias("decoder.layers.self_attention.linear_qkv.", {row: f"{_MIXER}.{row}_proj" for row in QKV}),
        *without_bias("decoder.layers.self_attention.linear_proj.", f"{_MIXER}.o_proj"),
        *_norm_before("mlp.linear_fc1"),
        *without_bias("decoder.layers.mlp.linear_fc1.", f"{_MIXER}.up_proj"),
        *without_bias("decoder.layers.mlp.linear_fc2.", f"{_MIXER}.down_proj"),
        *without_bias("decoder.final_norm.", "backbone.norm_f"),
    ),
    # The length at which sequences are cut, the initialisation of weights, settings of layers that these models do not
    # have, and two that repeat others.
    harmless=(
        *("chunk_size", "expand", "mamba_ssm_cache_dtype", "num_logits_to_keep", "rescale_prenorm_residual"),
        *("time_step_floor", "time_step_max", "time_step_min", "time_step_rank", "use_mamba_kernels", "rms_norm_eps"),
        *("attention_head_dim", "hybrid_override_pattern", "num_query_groups", "mtp_layers_block_type"),
        *("moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "topk_group"),
        *("moe_shared_expert_overlap", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob"),
        *("num_experts_per_tok", "routed_scaling_factor"),
    ),
    neutral={"num_nextn_predict_layers": (0,)},
    one_spelling=with_pattern,
)

FAMILIES = (
    Family("Nemotron-H", "NemotronH", "gpt", hugging_face=NEMOTRON_H),
    Family("Nemotron Nano v2", "NemotronNano", "gpt", hugging_face=NEMOTRON_H),
)
