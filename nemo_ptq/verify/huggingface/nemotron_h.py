# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H's config.json and modules, read without transformers, of which not every version has the class."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.huggingface.architectures import NOT_COMPUTED, Architecture, StoredModule
from nemo_ptq.verify.model_config import MOST_LAYERS, Hybrid, ModelConfig

_STATE_SPACE, _ATTENTION, _MLP = "M", "*", "-"
# What transformers 5 calls the layers.
_KINDS = {
    **{"linear_attention": _STATE_SPACE, "mamba": _STATE_SPACE, "mlp": _MLP},
    **{"full_attention": _ATTENTION, "attention": _ATTENTION},
}
# Sizes, and what the class has where config.json does not say.
_SIZES: Mapping[str, int] = {
    **{"vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "max_position_embeddings": 4096, "ssm_state_size": 128, "mamba_num_heads": 128},
    **{"mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4},
}
_LARGEST = 2**31
# What the forward pass takes for granted.
_PRESUMED: Mapping[str, tuple[Any, ...]] = {
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    **dict.fromkeys(("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias", "residual_in_fp32"), (False,)),
    "use_conv_bias": (True,),
    "sliding_window": (None,),
    # The second is how transformers 5 writes the first, which is no JSON.
    "time_step_limit": ([0.0, math.inf], [0.0, {"__float__": "Infinity"}], None),
    "num_nextn_predict_layers": (0,),
}
_READ = (
    *("attention_head_dim", "head_dim", "hybrid_override_pattern", "layers_block_type", "layer_types"),
    *("layer_norm_epsilon", "num_hidden_layers", "tie_word_embeddings", "model_type", "architectures"),
)
# Settings that logits do not depend on: how kernels cut sequences, how weights begin, what these models do not have.
_IDLE = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache", "output_attentions"),
    *("output_hidden_states", "return_dict", "id2label", "label2id", "is_decoder", "is_encoder_decoder"),
    *("chunk_size", "expand", "mamba_ssm_cache_dtype", "num_logits_to_keep", "num_query_groups", "rms_norm_eps"),
    *("rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_min", "time_step_rank"),
    *("use_mamba_kernels", "mtp_layers_block_type", "moe_intermediate_size", "moe_latent_size", "n_group"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "n_routed_experts", "n_shared_experts"),
    *("norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group"),
)


def hybrid_config(content: Mapping[str, Any]) -> ModelConfig:
    """Returns the sizes of a model.

    Args:
        content: Content of config.json.

    Raises:
        PtqError: If it has settings that the forward pass does not compute.
    """
    known = {*_SIZES, *_PRESUMED, *_READ, *_IDLE, *NOT_COMPUTED}
    for name, value in content.items():
        if name not in known:
            raise PtqError(f"config.json has {name} {value!r}, which the reader does not know")
        if name in _PRESUMED and value not in _PRESUMED[name]:
            raise PtqError(f"config.json has {name} {value!r}, which the reader does not compute")
    sizes = {name: content.get(name, default) for name, default in _SIZES.items()}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _LARGEST:
            raise PtqError(f"config.json: {name} is {size!r}, expected a positive integer")
    heads, pattern = sizes["num_attention_heads"], _pattern(content)
    for whole, parts in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
        if sizes[whole] % sizes[parts]:
            raise PtqError(f"config.json: {parts} {sizes[parts]} does not divide {whole} {sizes[whole]}")
    return ModelConfig(
        decoder="gpt",
        dtype=str(content.get("dtype") or content.get("torch_dtype") or "float32").removeprefix("torch."),
        num_hidden_layers=len(pattern),
        num_attention_heads=heads,
        num_key_value_heads=sizes["num_key_value_heads"],
        hidden_size=sizes["hidden_size"],
        head_size=content.get("head_dim") or content.get("attention_head_dim") or 128,
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_position_embeddings"],
        norm_epsilon=content.get("layer_norm_epsilon", 1e-5),
        rmsnorm=True,
        hidden_act="relu2",
        position_embedding_type="none",
        rotary_pct=1.0,
        rotary_base=10000.0,
        rotary_scaling=None,
        share_embedding_table=bool(content.get("tie_word_embeddings", False)),
        moe=None,
        hybrid=Hybrid(
            pattern,
            sizes["mamba_num_heads"],
            sizes["mamba_head_dim"],
            sizes["ssm_state_size"],
            sizes["n_groups"],
            sizes["conv_kernel"],
        ),
    )


def _pattern(content: Mapping[str, Any]) -> str:
    pattern = content.get("hybrid_override_pattern")
    if pattern is None:
        names = content.get("layers_block_type") or content.get("layer_types") or ()
        pattern = "".join(_KINDS.get(str(name), "?") for name in names)
    layers = content.get("num_hidden_layers", len(pattern))
    if not isinstance(pattern, str) or not 1 <= len(pattern) <= MOST_LAYERS or not set(pattern) <= {*_KINDS.values()}:
        raise PtqError(f"config.json: the kinds of layers are {pattern!r:.60}, expected M, * or - for each")
    if layers != len(pattern):
        raise PtqError(f"config.json: num_hidden_layers is {layers!r}, and there are {len(pattern)} kinds of layers")
    return pattern


def hybrid_modules(architecture: Architecture, config: ModelConfig) -> dict[str, StoredModule]:
    """Returns every module of a model that has a weight, by Hugging Face's name of it."""
    found: dict[str, StoredModule] = {}
    for ours, module in _outside(config):
        found[architecture.names[ours][0]] = module
    assert config.hybrid is not None
    for layer, kind in enumerate(config.hybrid.pattern):
        for ours, modules in (("norm", [StoredModule("norm", (config.hidden_size,))]), *_OF_KIND[kind](config)):
            names = (name.format(layer=layer) for name in architecture.names[ours])
            found |= dict(zip(names, modules, strict=True))
    return found


_Modules = Iterator[tuple[str, list[StoredModule]]]


def _outside(config: ModelConfig) -> Iterator[tuple[str, StoredModule]]:
    yield "vocab_embedding", StoredModule("embedding", (config.vocab_size, config.hidden_size))
    yield "ln_f", StoredModule("norm", (config.hidden_size,))
    yield "lm_head", StoredModule("linear", (config.vocab_size, config.hidden_size))


def _state_space(config: ModelConfig) -> _Modules:
    sizes, hidden = config.hybrid, config.hidden_size
    assert sizes is not None
    inner, channels = sizes.inner_size, sizes.inner_size + 2 * sizes.groups * sizes.state_size
    yield "ssm.in_proj", [StoredModule("linear", (inner + channels + sizes.heads, hidden))]
    yield "ssm.conv1d", [StoredModule("norm", (channels, 1, sizes.kernel), True)]
    yield "ssm", [StoredModule("state", (sizes.heads,), weights=("A_log", "D", "dt_bias"))]
    yield "ssm.norm", [StoredModule("norm", (inner,))]
    yield "ssm.out_proj", [StoredModule("linear", (hidden, inner))]


def _attention(config: ModelConfig) -> _Modules:
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    yield "attention.qkv", [StoredModule("linear", (rows, hidden)) for rows in (queries, keys, keys)]
    yield "attention.dense", [StoredModule("linear", (hidden, queries))]


def _mlp(config: ModelConfig) -> _Modules:
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "mlp.fc", [StoredModule("linear", (inner, hidden))]
    yield "mlp.proj", [StoredModule("linear", (hidden, inner))]


_OF_KIND = {_STATE_SPACE: _state_space, _ATTENTION: _attention, _MLP: _mlp}
