# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's model classes: what they compute, their modules and the modules' sizes. Needs no class of theirs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.model_config import ModelConfig, Moe, RotaryScaling

# Names of a layer's modules here, and Hugging Face's; outputs of several stand one after the other.
Names = Mapping[str, tuple[str, ...]]

_ALL_BUT_MLP: Names = {
    "vocab_embedding": ("model.embed_tokens",),
    "ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
    "input_layernorm": ("model.layers.{layer}.input_layernorm",),
    "post_layernorm": ("model.layers.{layer}.post_attention_layernorm",),
    "attention.qkv": tuple(f"model.layers.{{layer}}.self_attn.{row}_proj" for row in "qkv"),
    "attention.dense": ("model.layers.{layer}.self_attn.o_proj",),
}
_LLAMA: Names = {
    **_ALL_BUT_MLP,
    "mlp.fc": ("model.layers.{layer}.mlp.gate_proj",),
    "mlp.gate": ("model.layers.{layer}.mlp.up_proj",),
    "mlp.proj": ("model.layers.{layer}.mlp.down_proj",),
}
_MIXTRAL: Names = {
    **_ALL_BUT_MLP,
    "mlp.router": ("model.layers.{layer}.block_sparse_moe.gate",),
    "mlp.fc": tuple(f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.w{part}" for part in (3, 1)),
    "mlp.proj": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",),
}
_QK_NORMS: Names = {f"attention.{row}_layernorm": (f"model.layers.{{layer}}.self_attn.{row}_norm",) for row in "qk"}
_QWEN3: Names = {**_LLAMA, **_QK_NORMS}
_QWEN3_MOE: Names = {
    **_ALL_BUT_MLP,
    **_QK_NORMS,
    "mlp.router": ("model.layers.{layer}.mlp.gate",),
    "mlp.fc": tuple(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj" for part in ("up", "gate")),
    "mlp.proj": ("model.layers.{layer}.mlp.experts.{expert}.down_proj",),
}
_PHI3: Names = {
    **_ALL_BUT_MLP,
    "attention.qkv": ("model.layers.{layer}.self_attn.qkv_proj",),
    "mlp.fc": ("model.layers.{layer}.mlp.gate_up_proj",),
    "mlp.gate": ("model.layers.{layer}.mlp.gate_up_proj",),
    "mlp.proj": ("model.layers.{layer}.mlp.down_proj",),
}
_GEMMA2: Names = {
    **_LLAMA,
    "pre_feedforward_layernorm": ("model.layers.{layer}.pre_feedforward_layernorm",),
    "post_feedforward_layernorm": ("model.layers.{layer}.post_feedforward_layernorm",),
}
_GEMMA3: Names = {**_GEMMA2, **_QK_NORMS}
_STARCODER2: Names = {
    **_ALL_BUT_MLP,
    "mlp.fc": ("model.layers.{layer}.mlp.c_fc",),
    "mlp.proj": ("model.layers.{layer}.mlp.c_proj",),
}
_NEMOTRON: Names = {
    **_ALL_BUT_MLP,
    "mlp.fc": ("model.layers.{layer}.mlp.up_proj",),
    "mlp.proj": ("model.layers.{layer}.mlp.down_proj",),
}
_NEMOTRON_H: Names = {
    "vocab_embedding": ("backbone.embeddings",),
    "ln_f": ("backbone.norm_f",),
    "lm_head": ("lm_head",),
    "norm": ("backbone.layers.{layer}.norm",),
    "ssm": ("backbone.layers.{layer}.mixer",),
    **{f"ssm.{name}": (f"backbone.layers.{{layer}}.mixer.{name}",) for name in ("in_proj", "conv1d", "norm")},
    "ssm.out_proj": ("backbone.layers.{layer}.mixer.out_proj",),
    "attention.qkv": tuple(f"backbone.layers.{{layer}}.mixer.{row}_proj" for row in "qkv"),
    "attention.dense": ("backbone.layers.{layer}.mixer.o_proj",),
    "mlp.fc": ("backbone.layers.{layer}.mixer.up_proj",),
    "mlp.proj": ("backbone.layers.{layer}.mixer.down_proj",),
}
_BIGCODE: Names = {
    "vocab_embedding": ("transformer.wte",),
    "position_embedding": ("transformer.wpe",),
    "ln_f": ("transformer.ln_f",),
    "lm_head": ("lm_head",),
    "input_layernorm": ("transformer.h.{layer}.ln_1",),
    "post_layernorm": ("transformer.h.{layer}.ln_2",),
    "attention.qkv": ("transformer.h.{layer}.attn.c_attn",),
    "attention.dense": ("transformer.h.{layer}.attn.c_proj",),
    "mlp.fc": ("transformer.h.{layer}.mlp.c_fc",),
    "mlp.proj": ("transformer.h.{layer}.mlp.c_proj",),
}


@dataclass(frozen=True)
class Architecture:
    """One of Hugging Face's model classes.

    Attributes:
        model_type: Value of model_type in config.json.
        decoder: As in :class:`~nemo_ptq.verify.model_config.ModelConfig`.
        names: Names of its modules.
        settings: Its names of settings that differ between classes.
        zero_centered: Whether the gains of norms are stored minus one.
        has_biases: Whether every linear layer but the last has a bias.
        has_qkv_bias: Whether the query-key-value projection has one, and no other layer.
        is_hybrid: Whether layers are of several kinds: :mod:`~nemo_ptq.verify.huggingface.nemotron_h` reads it.
    """

    model_type: str
    decoder: str
    names: Names
    settings: Mapping[str, str] = field(default_factory=dict)
    zero_centered: bool = False
    has_biases: bool = False
    has_qkv_bias: bool = False
    is_hybrid: bool = False

    @property
    def has_fused_gate(self) -> bool:
        """Whether the first layers of an MLP are one: the rows that are activated, then the others."""
        return "mlp.gate" in self.names and self.names["mlp.gate"] == self.names["mlp.fc"]


_GEMMA_SETTINGS = {"hidden_act": "hidden_activation"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", "llama", _LLAMA),
    "MistralForCausalLM": Architecture("mistral", "llama", _LLAMA),
    "MixtralForCausalLM": Architecture("mixtral", "llama", _MIXTRAL),
    "Qwen2ForCausalLM": Architecture("qwen2", "qwen2", _LLAMA, has_qkv_bias=True),
    "Qwen3ForCausalLM": Architecture("qwen3", "qwen3", _QWEN3),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe", "qwen3_moe", _QWEN3_MOE, {"intermediate_size": "moe_intermediate_size"}
    ),
    "Phi3ForCausalLM": Architecture("phi3", "llama", _PHI3),
    "GemmaForCausalLM": Architecture("gemma", "gemma", _LLAMA, zero_centered=True),
    "Gemma2ForCausalLM": Architecture("gemma2", "gemma", _GEMMA2, _GEMMA_SETTINGS, zero_centered=True),
    "Gemma3ForCausalLM": Architecture("gemma3_text", "gemma", _GEMMA3, _GEMMA_SETTINGS, zero_centered=True),
    "Starcoder2ForCausalLM": Architecture(
        "starcoder2", "gpt", _STARCODER2, {"norm_epsilon": "norm_epsilon"}, has_biases=True
    ),
    "NemotronForCausalLM": Architecture("nemotron", "gpt", _NEMOTRON, {"norm_epsilon": "norm_eps"}, zero_centered=True),
    "NemotronHForCausalLM": Architecture("nemotron_h", "gpt", _NEMOTRON_H, is_hybrid=True),
    "GPTBigCodeForCausalLM": Architecture(
        "gpt_bigcode",
        "gpt",
        _BIGCODE,
        {"norm_epsilon": "layer_norm_epsilon", "intermediate_size": "n_inner", "hidden_act": "activation_function"},
        has_biases=True,
    ),
}


def model_config(hf: Any, architecture: Architecture) -> ModelConfig:
    """Returns the sizes of a model.

    Args:
        hf: Transformers' configuration of it.
        architecture: Its architecture.

    Raises:
        PtqError: If its rotary embedding is of a kind that is not known.
    """

    def setting(name: str, hf_name: str) -> Any:
        return getattr(hf, architecture.settings.get(name, hf_name))

    heads, hidden = hf.num_attention_heads, hf.hidden_size
    multi_query = getattr(hf, "multi_query", None)
    kv_heads = getattr(hf, "num_key_value_heads", None) or (1 if multi_query else heads)
    act = setting("hidden_act", "hidden_act")
    experts = getattr(hf, "num_local_experts", None) or getattr(hf, "num_experts", None)
    layer_types = getattr(hf, "layer_types", None) or ()
    scalar = getattr(hf, "query_pre_attn_scalar", None)
    rotary = "position_embedding" not in architecture.names
    base, share, scaling = _rotary(hf)
    return ModelConfig(
        decoder=architecture.decoder,
        dtype=str(hf.dtype or "float32").removeprefix("torch."),
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=hidden,
        head_size=getattr(hf, "head_dim", None) or hidden // heads,
        intermediate_size=setting("intermediate_size", "intermediate_size") or 4 * hidden,
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        norm_epsilon=setting("norm_epsilon", "rms_norm_eps"),
        rmsnorm=architecture.decoder != "gpt",
        # Transformers' "gelu" is exact, where TensorRT-LLM's is an approximation.
        hidden_act={"gelu": "gelu_erf"}.get(act, act),
        position_embedding_type="rope_gpt_neox" if rotary else "learned_absolute",
        rotary_pct=share,
        rotary_base=base,
        rotary_scaling=scaling,
        share_embedding_table=bool(hf.tie_word_embeddings),
        moe=Moe(experts, hf.num_experts_per_tok, 1) if experts else None,
        attention_window=getattr(hf, "sliding_window", None),
        global_layers=frozenset(layer for layer, kind in enumerate(layer_types) if kind == "full_attention"),
        qk_norm="attention.q_layernorm" in architecture.names,
        post_norms="post_feedforward_layernorm" in architecture.names,
        attention_scale=None if scalar is None else scalar**-0.5,
        attention_cap=getattr(hf, "attn_logit_softcapping", None),
        logit_cap=getattr(hf, "final_logit_softcapping", None),
        local_rotary_base=_local_base(hf),
    )


def _local_base(hf: Any) -> float | None:
    """The base of the rotary embedding of layers with a window, where they have one of their own."""
    new = (getattr(hf, "rope_parameters", None) or {}).get("sliding_attention") or {}
    return new.get("rope_theta", getattr(hf, "rope_local_base_freq", None))


_LENGTH = "original_max_position_embeddings"
# Fields of a scaling that is linear, or Llama 3.1's.
_SCALING = {"factor", "low_freq_factor", "high_freq_factor", _LENGTH}


def _rotary(hf: Any) -> tuple[float, float, RotaryScaling | None]:
    """Base, rotated share and scaling; transformers 5 has all of them in rope_parameters."""
    new, old = (getattr(hf, name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    new = new.get("full_attention", new)  # where layers with a window have another
    base = new.get("rope_theta", getattr(hf, "rope_theta", 10000.0))
    share = new.get("partial_rotary_factor", getattr(hf, "partial_rotary_factor", 1.0))
    raw = {name: value for name, value in (new or old).items() if name not in ("rope_theta", "partial_rotary_factor")}
    kind = raw.pop("rope_type", raw.pop("type", "default"))
    raw.pop("type", None)
    if kind == "default":
        return base, share, None
    if kind == "longrope" and hasattr(hf, _LENGTH):
        return base, share, _long_rope(hf, share, raw)
    if kind not in ("linear", "llama3"):
        raise PtqError(f"config.json has rope_scaling of type {kind!r}, expected linear, llama3 or a Phi's longrope")
    unknown = sorted(raw.keys() - _SCALING)
    if unknown:
        raise PtqError(f"config.json has rope_scaling with {', '.join(unknown)}, which the reader does not compute")
    return base, share, RotaryScaling(kind, **raw)


def _long_rope(hf: Any, share: float, raw: dict[str, Any]) -> RotaryScaling:
    """Phi's scaling, of which the class has the length beside it."""
    context = hf.original_max_position_embeddings
    if not isinstance(context, int) or context < 2 or raw.pop(_LENGTH, context) != context:
        raise PtqError(f"config.json has {_LENGTH} {context!r}, expected one number above 1 wherever it is")
    count = int((getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads) * share) // 2
    short, long = (raw.pop(name, None) for name in ("short_factor", "long_factor"))
    if raw or not all(_are_factors(factors, count) for factors in (short, long)):
        raise PtqError(
            f"config.json has rope_scaling of type 'longrope' with {', '.join(raw) or 'other factors'}, expected "
            f"short_factor and long_factor of {count} positive numbers each, and nothing else"
        )
    factor = hf.max_position_embeddings / context
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return RotaryScaling("longrope", factor, 1.0, 4.0, context, tuple(short), tuple(long), attention_factor)


def _are_factors(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) and 0 < value < math.inf for value in values)
    )


# Settings that the logits do not depend on, beside those that every class of transformers' has: some are of older or
# newer versions of it, some of the programs that models are trained and served with.
NOT_COMPUTED = frozenset(
    (
        *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled"),
        *(
            "_model_name_or_path",
            "_name_or_path",
            "attention_dropout",
            "attention_softmax_in_fp32",
            "attn_implementation",
            "attn_pdrop",
        ),
        *(
            "auto_map",
            "bad_words_ids",
            "begin_suppress_tokens",
            "cache_implementation",
            "decoder_start_token_id",
            "diversity_penalty",
        ),
        *("do_sample", "dtype", "early_stopping", "embd_pdrop", "embedding_dropout", "encoder_no_repeat_ngram_size"),
        *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id"),
        *("hidden_activation", "hidden_dropout", "inference_runner", "initializer_range", "is_llama_config"),
        *("layer_norm_epsilon", "length_penalty", "max_batch_size", "max_length", "max_new_tokens"),
        *(
            "max_sequence_length",
            "max_window_layers",
            "min_length",
            "name_or_path",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
        ),
        *("num_labels", "num_return_sequences", "output_router_logits", "output_scores", "pad_key_length"),
        *("pre_allocate_kv_cache", "prefix", "pretraining_tp", "problem_type", "quantization_config"),
        *("remove_invalid_values", "repetition_penalty", "resid_pdrop", "residual_dropout", "return_dict_in_generate"),
        *("router_aux_loss_coef", "router_jitter_noise", "scale_attention_softmax_in_fp32", "sep_token_id"),
        *("sliding_window_size",),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
        *("summary_use_proj", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss"),
        *("tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "typical_p"),
        *("unsloth_fixed", "unsloth_version", "unk_token_id", "use_bfloat16", "validate_runner_input"),
    )
)
# Settings that are computed, or looked at here, whether a class has them or not.
_LOOKED_AT = ("head_dim", "layer_types", "num_local_experts", "rope_parameters", "rope_scaling")
# What the forward pass takes for granted, where a class has such a setting.
_PRESUMED: Mapping[str, Any] = {
    "add_cross_attention": False,
    "decoder_sparse_step": 1,
    "is_encoder_decoder": False,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "scale_attn_weights": True,
    "use_bias": True,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
}
# Settings that a class does not have, and that ask nothing of it with this value.
_OFF: Mapping[str, Any] = {
    **_PRESUMED,
    "attention_bias": False,
    "chunk_size_feed_forward": 0,
    "compression_config": {},
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "is_causal": True,
    "is_decoder": False,
    "lm_head_bias": False,
    "mlp_bias": False,
    "mlp_type": "default",
    "norm_type": "layer_norm",
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "qk_layernorm": False,
    "qkv_bias": False,
    "rope_interleaved": False,
    "shared_expert_intermediate_size": 0,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
# Types of models that normalise queries and keys.
_WITH_QK_NORMS = ("gemma3_text", "qwen3", "qwen3_moe")


def setting_problems(content: Mapping[str, Any], hf: Any) -> list[str]:
    """Returns what a config.json says that the forward pass does not compute.

    Args:
        content: Content of config.json.
        hf: Transformers' configuration of it.
    """
    own = {*type(hf)().to_dict(), *type(hf).attribute_map}
    if hasattr(hf, "_sliding_window_pattern"):
        own.add("sliding_window_pattern")
    if "rope_parameters" in own:  # transformers 5 takes the older name, and does not keep it
        own.add("rope_theta")
    given = {name: value for name, value in content.items() if value is not None}
    unknown = [name for name in given if name not in own and name not in NOT_COMPUTED and name not in _LOOKED_AT]
    # Files of Gemma 2 have the activation under both names, and transformers reads one.
    off = {**_OFF, "hidden_act": getattr(hf, "hidden_activation", None), "use_qk_norm": hf.model_type in _WITH_QK_NORMS}
    problems = [
        f"has {name} {given[name]!r}, which the reader does not know: take it out if it changes nothing"
        for name in unknown
        if name not in off or given[name] != off[name]
    ]
    problems += [
        f"has {name} {getattr(hf, name)!r}, which the reader does not compute"
        for name, presumed in _PRESUMED.items()
        # A switch that is null is off.
        if name in own and getattr(hf, name) not in ((False, None) if presumed is False else (presumed,))
    ]
    if "layer_types" in given:
        problems += _layer_type_problems(
            given["layer_types"], getattr(hf, "sliding_window", None), "layer_types" in own
        )
    rotary = given.get("rope_parameters", {})
    if "full_attention" in rotary:
        local, rotary = rotary.get("sliding_attention") or {}, rotary["full_attention"]
        own_base = given.get("rope_local_base_freq", local.get("rope_theta"))
        if local.get("rope_theta", own_base) != own_base or local.get("rope_type", "default") != "default":
            problems.append(
                f"has rope_parameters {local!r} of layers with a window, and rope_local_base_freq {own_base}"
            )
    problems += [
        f"has {name} {given[name]!r} and {rotary[name]!r} in rope_parameters"
        for name in ("rope_theta", "partial_rotary_factor")
        if name in rotary and given.get(name, rotary[name]) != rotary[name]
    ]
    return problems


def _layer_type_problems(types: Sequence[str], window: int | None, may_differ: bool) -> list[str]:
    """What is wrong with what a config.json says that layers attend to, beside their window."""
    kind = "full_attention" if window is None else "sliding_attention"
    allowed = {kind, "full_attention"} if may_differ else {kind}
    if set(types) <= allowed:
        return []
    return [
        f"has layer_types {types!r}, of which the model's class, with sliding_window {window}, has {sorted(allowed)}"
    ]


@dataclass(frozen=True)
class StoredModule:
    """A module with a weight.

    Attributes:
        kind: "embedding", "norm", "linear" or "state".
        shape: Shape of its weight: (rows, hidden), (hidden) or (out, in).
        has_bias: Whether there is a bias of as many elements as the weight has rows.
        weights: Names of its weights, which are all of that shape.
    """

    kind: str
    shape: tuple[int, ...]
    has_bias: bool = False
    weights: tuple[str, ...] = ("weight",)


def stored_modules(architecture: Architecture, config: ModelConfig) -> dict[str, StoredModule]:
    """Returns every module of a model that has a weight, by Hugging Face's name of it."""
    found: dict[str, StoredModule] = {}
    for ours, theirs in architecture.names.items():
        modules = list(_of_one_kind(ours, len(theirs), architecture, config))
        for name, module in zip(theirs, modules, strict=True):
            layers = range(config.num_hidden_layers if "{layer}" in name else 1)
            experts = range(config.moe.num_experts if "{expert}" in name and config.moe else 1)
            found |= {name.format(layer=layer, expert=expert): module for layer in layers for expert in experts}
    return found


def _of_one_kind(ours: str, parts: int, architecture: Architecture, config: ModelConfig) -> Iterator[StoredModule]:
    """What stands under one of our names, in as many modules as Hugging Face has for it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    if ours.endswith("embedding"):
        yield StoredModule(
            "embedding", (config.max_position_embeddings if "position" in ours else config.vocab_size, hidden)
        )
    elif ours.endswith(("layernorm", "ln_f")):
        size = config.head_size if ours.startswith("attention.") else hidden
        yield StoredModule("norm", (size,), not config.rmsnorm)
    elif ours == "lm_head":
        yield StoredModule("linear", (config.vocab_size, hidden))
    elif ours == "mlp.router":
        assert config.moe is not None
        yield StoredModule("linear", (config.moe.num_experts, hidden))
    else:
        rows = {
            "attention.qkv": (queries, keys, keys) if parts > 1 else (queries + 2 * keys,),
            "attention.dense": (hidden,),
            "mlp.proj": (hidden,),
        }.get(ours, (2 * inner,) if architecture.has_fused_gate else (inner,) * parts)
        inputs = {"attention.dense": queries, "mlp.proj": inner}.get(ours, hidden)
        for out in rows:
            has_bias = architecture.has_biases or (architecture.has_qkv_bias and ours == "attention.qkv")
            yield StoredModule("linear", (out, inputs), has_bias)
