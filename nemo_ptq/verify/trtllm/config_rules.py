# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules that config.json must keep for TensorRT-LLM 0.15 to 1.2 to load the directory and mean the same by it.

Every rule takes the file's object and its parsed record and returns the problems it found, one readable line each.
"""

from collections.abc import Callable, Iterator
from typing import Any

from nemo_ptq.verify.model_config import GATED_ACTIVATIONS, Config
from nemo_ptq.verify.trtllm.expected_tensors import (
    ALGORITHMS,
    NVFP4_BLOCK_SIZE,
    SAFETENSORS_DTYPE,
    Linear,
    layer_linears,
    lm_head,
)

Rule = Callable[[dict[str, Any], Config], list[str]]

_REQUIRED_KEYS = frozenset(
    {
        *("producer", "architecture", "decoder", "dtype", "logits_dtype", "rank", "mapping", "quantization"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_size", "head_size", "intermediate_size", "vocab_size", "max_position_embeddings"),
        *("hidden_act", "norm_epsilon", "rmsnorm", "position_embedding_type", "residual_mlp", "bias", "lm_head_bias"),
        *("use_parallel_embedding", "embedding_sharding_dim", "share_embedding_table"),
    }
)
_REQUIRED_SECTIONS = {"producer": ("name", "version"), "mapping": ("world_size", "tp_size", "pp_size")}
_ROTARY_KEYS = frozenset({"rotary_pct", "rotary_base"})
_QWEN_KEYS = frozenset({"attn_bias", "mlp_bias", "qwen_type", "seq_length"})
_GEMMA_KEYS = {
    "gemma2": frozenset({"query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"}),
    "gemma3": frozenset(
        {
            *("query_pre_attn_scalar", "final_logit_softcapping", "_sliding_window_pattern", "sliding_window"),
            "rope_local_base_freq",
        }
    ),
}
_OPTIONAL_KEYS = frozenset({"rotary_scaling", "moe", "attn_bias", "mlp_bias", "qk_layernorm"}) | _ROTARY_KEYS

_MAPPING_KEYS = frozenset({"world_size", "tp_size", "pp_size", "moe_tp_size", "moe_ep_size"})
_MOE_KEYS = frozenset({"num_experts", "top_k", "normalization_mode"})
_QUANTIZATION_KEYS = frozenset(
    {
        *("quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe"),
        *("has_zero_point", "pre_quant_scale", "exclude_modules"),
    }
)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "gpt": "GPTForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Decoders with experts.
_MOE_DECODERS = ("llama", "qwen3_moe")

_GELUS = frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "openai-gelu"})
_KNOWN_ACTIVATIONS = (
    _GELUS
    | GATED_ACTIVATIONS
    | {"relu", "tanh", "gegelu", "identity", "silu", "softplus", "relu2", "squared-relu", "sigmoid", "quick_gelu"}
)

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _keys(raw: dict[str, Any], config: Config) -> list[str]:
    required = _REQUIRED_KEYS | (_ROTARY_KEYS if config.position_embedding_type == "rope_gpt_neox" else frozenset())
    if config.is_qwen:
        required |= _QWEN_KEYS | ({"moe_intermediate_size"} if config.moe else frozenset())
    required |= _GEMMA_KEYS.get(config.decoder, frozenset())
    missing = sorted(required - raw.keys())
    unknown = sorted(raw.keys() - required - _OPTIONAL_KEYS)
    problems = [f"{key} is missing" for key in missing] + [f"{key} is not a key of this format" for key in unknown]
    for section, keys in _REQUIRED_SECTIONS.items():
        if section not in missing:
            found = raw[section] if isinstance(raw[section], dict) else {}
            problems += [f"{section}.{key} is missing" for key in keys if found.get(key) is None]
    return problems


def _architecture(raw: dict[str, Any], config: Config) -> list[str]:
    expected = _ARCHITECTURES.get(config.decoder)
    if expected is None:
        return [f"decoder {config.decoder!r} is not one of {', '.join(_ARCHITECTURES)}"]
    problems = []
    if config.architecture != expected:
        problems.append(f"architecture is {config.architecture!r}; decoder {config.decoder} needs {expected!r}")
    if config.rmsnorm != (config.decoder != "gpt"):
        problems.append(f"rmsnorm is {config.rmsnorm}; the reader's {config.decoder} decoder has the other norm")
    return problems


def _dtypes(raw: dict[str, Any], config: Config) -> list[str]:
    if config.dtype not in SAFETENSORS_DTYPE:
        return [f"dtype is {config.dtype!r}, expected one of {', '.join(SAFETENSORS_DTYPE)}"]
    expected = "float16" if config.dtype == "bfloat16" else config.dtype
    return _differs(raw, "logits_dtype", expected)


def _mapping(raw: dict[str, Any], config: Config) -> list[str]:
    mapping = config.mapping
    problems = _unknown_keys(raw, "mapping", _MAPPING_KEYS)
    if mapping.world_size != mapping.tp_size * mapping.pp_size:
        problems.append(
            f"mapping.world_size is {mapping.world_size}, expected tp_size * pp_size = "
            f"{mapping.tp_size} * {mapping.pp_size}"
        )
    if mapping.moe_tp_size * mapping.moe_ep_size != mapping.tp_size:
        problems.append(
            f"mapping.moe_tp_size * moe_ep_size is {mapping.moe_tp_size} * {mapping.moe_ep_size}, "
            f"expected tp_size = {mapping.tp_size}"
        )
    elif mapping.moe_ep_size != 1:
        problems.append(f"mapping.moe_ep_size is {mapping.moe_ep_size}; rank files cut experts by tensor parallelism")
    return problems + _differs(raw, "rank", mapping.world_size - 1)


def _divisibility(raw: dict[str, Any], config: Config) -> list[str]:
    tp_size, kv_heads = config.mapping.tp_size, config.num_key_value_heads
    problems = [
        f"{name} {value} does not divide by {divisor_name} {divisor}"
        for name, value, divisor_name, divisor in (
            ("num_attention_heads", config.num_attention_heads, "tp_size", tp_size),
            ("num_attention_heads", config.num_attention_heads, "num_key_value_heads", kv_heads),
            ("intermediate_size", config.intermediate_size, "tp_size", tp_size),
            ("num_hidden_layers", config.num_hidden_layers, "pp_size", config.mapping.pp_size),
        )
        if value % divisor
    ]
    if kv_heads % tp_size and tp_size % kv_heads:
        problems.append(f"num_key_value_heads {kv_heads} and tp_size {tp_size}: neither divides the other")
    return problems


def _quantization(raw: dict[str, Any], config: Config) -> list[str]:
    problems = _unknown_keys(raw, "quantization", _QUANTIZATION_KEYS)
    algorithm, section = config.quantization.algorithm, raw.get("quantization") or {}
    if algorithm is not None and algorithm not in ALGORITHMS:
        return [*problems, f"quantization.quant_algo is {algorithm!r}, expected null or one of {', '.join(ALGORITHMS)}"]
    kv_algorithm = config.quantization.kv_cache_algorithm
    if kv_algorithm not in (None, "FP8", "INT8"):
        problems.append(f"quantization.kv_cache_quant_algo is {kv_algorithm!r}, expected null, FP8 or INT8")
    expected: dict[str, Any] = {}
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        expected = {"group_size": config.quantization.group_size, "has_zero_point": False, "pre_quant_scale": True}
    elif algorithm == "NVFP4":
        expected = {"group_size": NVFP4_BLOCK_SIZE}
    if algorithm == "W4A8_AWQ" and config.quantization.group_size == 64:
        problems.append("quantization.group_size 64 with W4A8_AWQ is refused by the reader")
    for key, value in expected.items():
        problems += _differs(section, key, value, "quantization.")
    allowed = {"quant_algo", "kv_cache_quant_algo", *expected} | ({"exclude_modules"} if algorithm else set())
    problems += [
        f"quantization.{key} does not belong to quant_algo {algorithm}"
        for key in sorted(section.keys() & _QUANTIZATION_KEYS - allowed)
    ]
    if "quant_algo" not in section or "kv_cache_quant_algo" not in section:
        problems.append("quantization needs quant_algo and kv_cache_quant_algo, be they null")
    return problems


def _exclude_modules(raw: dict[str, Any], config: Config) -> list[str]:
    if config.quantization.algorithm is None:
        return []
    problems = []
    section = raw.get("quantization") or {}
    if not section.get("exclude_modules"):
        problems.append(
            "quantization.exclude_modules is missing or empty; the readers' defaults for it differ by version"
        )
    if config.moe and not config.quantization.exclusion("transformer.layers.0.mlp.router"):
        problems.append("quantization.exclude_modules does not cover mlp.router, which no reader loads quantized")
    if config.lm_head_is_shared and not config.quantization.exclusion("lm_head"):
        problems.append("quantization.exclude_modules does not cover lm_head, which is shared with the embedding")
    return problems


def _quantized_shapes(raw: dict[str, Any], config: Config) -> list[str]:
    linears = [*layer_linears(config, 0), *([] if config.lm_head_is_shared else [lm_head(config)])]
    return [problem for linear in linears for problem in _shape_problems(config, linear)]


def _shape_problems(config: Config, linear: Linear) -> Iterator[str]:
    algorithm, group = config.quantization.algorithm_of(linear.module), config.quantization.group_size
    tp_size = config.mapping.tp_size
    name = linear.name.removeprefix("transformer.layers.0.")
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        # The reader rounds the features of every rank together up to this, and then refuses the file's shape.
        multiple = max(128 if algorithm == "W4A8_AWQ" else 64, group) * tp_size
        out = linear.out_features * (tp_size if linear.column_parallel else 1)
        in_ = linear.in_features * (1 if linear.column_parallel else tp_size)
        for what, size in (("out", out), ("in", in_)):
            if size % multiple:
                yield f"{name}: {what}-features {size} are no multiple of {multiple}, which {algorithm} needs"
        if linear.in_features % group:
            yield f"{name}: in-features {linear.in_features} of a rank do not divide by group_size {group}"
    if algorithm == "NVFP4" and (linear.out_features % 128 or linear.in_features % 64):
        yield (
            f"{name}: {linear.out_features} x {linear.in_features} weights of a rank; NVFP4 needs multiples of 128 x 64"
        )


def _activation(raw: dict[str, Any], config: Config) -> list[str]:
    act = config.hidden_act
    if act not in _KNOWN_ACTIVATIONS:
        return [f"hidden_act {act!r} is not one of {', '.join(sorted(_KNOWN_ACTIVATIONS))}"]
    expected: frozenset[str] = frozenset(_KNOWN_ACTIVATIONS - {"gegelu"})
    if config.moe:
        expected = frozenset({"swiglu"})
    elif config.decoder == "llama" or config.is_qwen:
        expected = frozenset({"silu"})
    elif config.decoder.startswith("gemma"):
        expected = _GELUS
    if act in expected:
        return []
    return [f"hidden_act is {act!r}; decoder {config.decoder} needs one of {', '.join(sorted(expected))}"]


def _position_embedding(raw: dict[str, Any], config: Config) -> list[str]:
    allowed = ("rope_gpt_neox", "learned_absolute") if config.decoder == "gpt" else ("rope_gpt_neox",)
    if config.position_embedding_type not in allowed:
        return [
            f"position_embedding_type is {config.position_embedding_type!r}; decoder {config.decoder} knows "
            + " and ".join(allowed)
        ]
    if config.position_embedding_type == "learned_absolute":
        return []
    if config.rotary_pct > 1 or (config.decoder != "gpt" and config.rotary_pct != 1):
        return [f"rotary_pct is {config.rotary_pct}; decoder {config.decoder} rotates whole heads"]
    if config.rotary_dim % 2:
        return [f"rotary_pct {config.rotary_pct} of head_size {config.head_size} is odd; rotated dimensions are pairs"]
    return []


def _rotary_scaling(raw: dict[str, Any], config: Config) -> list[str]:
    scaling, section = config.rotary_scaling, raw.get("rotary_scaling") or {}
    if scaling is None:
        return []
    required = {"linear": ("factor",), "llama3": _LLAMA3_KEYS}.get(scaling.type)
    if required is None:
        return [f"rotary_scaling.type is {scaling.type!r}, expected linear or llama3"]
    problems = [f"rotary_scaling.{key} is missing" for key in required if key not in section]
    problems += [
        f"rotary_scaling.{key} is unknown" for key in sorted(section.keys() - {"type", "rope_type", *required})
    ]
    # Transformers' name of the type; readers look at either.
    problems += _differs({"rope_type": scaling.type, **section}, "rope_type", scaling.type, "rotary_scaling.")
    if scaling.factor < 1:
        problems.append(f"rotary_scaling.factor is {scaling.factor}, expected at least 1")
    if scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        problems.append(
            f"rotary_scaling.low_freq_factor {scaling.low_freq_factor} is not below "
            f"high_freq_factor {scaling.high_freq_factor}"
        )
    if config.position_embedding_type != "rope_gpt_neox":
        problems.append(f"rotary_scaling does not belong to position_embedding_type {config.position_embedding_type}")
    return problems


def _embeddings(raw: dict[str, Any], config: Config) -> list[str]:
    fixed = {"use_parallel_embedding": True, "embedding_sharding_dim": 0, "lm_head_bias": False, "residual_mlp": False}
    problems = [problem for key, value in fixed.items() for problem in _differs(raw, key, value)]
    if raw.get("qk_layernorm", False) is not False:
        problems.append(f"qk_layernorm is {raw['qk_layernorm']!r}; no supported family has one")
    return problems


def _qwen(raw: dict[str, Any], config: Config) -> list[str]:
    if not config.is_qwen:
        return []
    problems = _differs(raw, "qwen_type", config.decoder) + _differs(raw, "mlp_bias", False)
    problems += _differs(raw, "seq_length", config.max_position_embeddings)
    # The reader takes the size of experts from a key of their own.
    return problems + (_differs(raw, "moe_intermediate_size", config.intermediate_size) if config.moe else [])


def _bias(raw: dict[str, Any], config: Config) -> list[str]:
    if config.decoder != "gpt" and raw.get("bias") is True and not (config.attention_bias or config.mlp_bias):
        return [f"bias is true, but the reader's {config.decoder} decoder only looks at attn_bias and mlp_bias"]
    return []


def _gemma(raw: dict[str, Any], config: Config) -> list[str]:
    needed = _GEMMA_KEYS.get(config.decoder, frozenset()) - {"final_logit_softcapping", "attn_logit_softcapping"}
    problems = [f"{key} is null; decoder {config.decoder} needs it" for key in sorted(needed) if raw.get(key) is None]
    if config.decoder == "gemma3" and config.rotary_scaling is not None:
        problems.append("rotary_scaling with decoder gemma3: its reader does not keep it from layers with a window")
    return problems


def _moe(raw: dict[str, Any], config: Config) -> list[str]:
    if config.moe is None:
        return []
    moe, algorithm = config.moe, config.quantization.algorithm_of("transformer.layers.0.mlp")
    problems = _unknown_keys(raw, "moe", _MOE_KEYS)
    if config.decoder not in _MOE_DECODERS:
        problems.append(f"moe with decoder {config.decoder}: only {' and '.join(_MOE_DECODERS)} have experts")
    if moe.num_experts < 2 or moe.top_k > moe.num_experts:
        problems.append(f"moe.top_k {moe.top_k} of {moe.num_experts} experts is impossible")
    problems += _differs(raw["moe"], "normalization_mode", 1, "moe.")
    if algorithm not in (None, "FP8"):
        problems.append(f"experts quantized with {algorithm}: the format only describes them for FP8")
    return problems


def _differs(section: dict[str, Any], key: str, expected: Any, prefix: str = "") -> list[str]:
    """A problem where a key has another value, or a value of another type that merely compares equal."""
    value = section.get(key)
    if value == expected and type(value) is type(expected):
        return []
    return [f"{prefix}{key} is {value!r}, expected {expected!r}"]


def _unknown_keys(raw: dict[str, Any], section: str, known: frozenset[str]) -> list[str]:
    return [
        f"{section}.{key} makes the directory unloadable: the reader does not know it"
        for key in sorted((raw.get(section) or {}).keys() - known)
    ]


# Without these, the tensors that the rank files must hold cannot be derived.
LAYOUT_RULES: dict[str, Rule] = {
    "architecture": _architecture,
    "dtypes": _dtypes,
    "mapping": _mapping,
    "divisibility": _divisibility,
    "quantization": _quantization,
    "position embedding": _position_embedding,
    "experts": _moe,
}
OTHER_RULES: dict[str, Rule] = {
    "keys": _keys,
    "exclude_modules": _exclude_modules,
    "quantized shapes": _quantized_shapes,
    "activation": _activation,
    "rotary scaling": _rotary_scaling,
    "embeddings": _embeddings,
    "biases": _bias,
    "Qwen's keys": _qwen,
    "Gemma's keys": _gemma,
}
