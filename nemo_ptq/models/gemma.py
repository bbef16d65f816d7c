# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, whose layers are Llama's, and the language models of Gemma 2 and 3, whose layers have more parts.

Gemma 2 and 3 also normalise the outputs of attention and MLP, and attend to a window in some layers. Gemma 2 caps its
scores and logits; Gemma 3 normalises queries and keys, and has another rotary embedding in layers with a window.
"""

import math
from collections.abc import Sequence
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.hf_settings import check_number, check_size, shown
from nemo_ptq.models.hugging_face import (
    FIELDS,
    GELU,
    NEMO,
    ZERO_CENTERED,
    HuggingFaceClass,
    Settings,
    llama_like,
    sizes,
)
from nemo_ptq.models.llama import RULES
from nemo_ptq.models.mapping import ATTENTION, EMBEDDING_RULE, GATED_MLP, QK_NORMS, SANDWICH_NORMS
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import NUMBER_LIMITS

# Early files of Gemma say "gelu" and mean the approximation. transformers reads hidden_act, and vLLM hidden_activation.
_TANH = "gelu_pytorch_tanh"

GEMMA = HuggingFaceClass(
    architecture="GemmaForCausalLM",
    config_class="GemmaConfig",
    nemo_model=NEMO + "gemma.GemmaModel",
    nemo_config=lambda hf: ("GemmaConfig", {}),  # the norms' weights are centred on zero on both sides
    nemo_settings=lambda nemo: {},
    nemo_fixed=llama_like("gelu") | ZERO_CENTERED,
    written={"hidden_act": _TANH, "hidden_activation": _TANH},
    defaults=sizes(256000, 3072, 24576, 28, 16, positions=8192, num_key_value_heads=16, head_dim=256)
    | {"rms_norm_eps": 1e-6, "hidden_act": GELU[0], "attention_bias": False, "tie_word_embeddings": True},
    fields=FIELDS,
    fixed={
        "hidden_act": GELU,
        "hidden_activation": (_TANH, None),
        "attention_bias": (False,),
        "rope_scaling": (None,),
        "tie_word_embeddings": (True,),
    },
    rules=RULES,
    can_tie=True,
)

_RULES = (EMBEDDING_RULE, *ATTENTION, *GATED_MLP, *SANDWICH_NORMS)
_FIXED = {
    # Published files have it beside hidden_activation, the one that transformers reads.
    "hidden_act": (_TANH, None),
    "hidden_activation": (_TANH,),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
}
_ACTIVATION: dict[str, Any] = {"hidden_activation": _TANH, "attention_bias": False, "tie_word_embeddings": True}


def _windows(layers: int, pattern: int) -> Sequence[str]:
    """The attention type of each layer, where the last of every few layers has no window."""
    return ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)]


def _gemma2_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    check_number("query_pre_attn_scalar", hf["query_pre_attn_scalar"])
    check_size("sliding_window", hf["sliding_window"])
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if hf[cap] is not None:
            check_number(cap, hf[cap])
    return "Gemma2Config", {
        "vocab_size": hf["vocab_size"],
        "window_size": (hf["sliding_window"], 0),
        **{name: hf[name] for name in _GEMMA2},
    }


_GEMMA2 = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")

GEMMA2 = HuggingFaceClass(
    architecture="Gemma2ForCausalLM",
    config_class="Gemma2Config",
    nemo_model=NEMO + "gemma2.Gemma2Model",
    nemo_config=_gemma2_config,
    nemo_settings=lambda nemo: {
        "sliding_window": nemo.window_size[0],
        **{name: getattr(nemo, name) for name in _GEMMA2},
    },
    nemo_fixed=llama_like("gelu") | ZERO_CENTERED,
    defaults=sizes(256000, 2304, 9216, 26, 8, positions=8192, num_key_value_heads=4, head_dim=256, rope_scaling=None)
    | {"rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **_ACTIVATION},
    fields=FIELDS,
    fixed=_FIXED | {"rope_scaling": (None,)},
    rules=_RULES,
    can_tie=True,
    harmless=("sliding_window_size",),  # of published files, and not read by transformers
    layer_types=lambda settings: _windows(settings["num_hidden_layers"], 2),
)


def _pattern(hf: Settings) -> int:
    """The length of the pattern: one layer without a window, and those with one before it."""
    value = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or _pattern_of(hf.get("layer_types"))
    if not isinstance(value, int) or value < 2:
        raise PtqError(
            f"config.json has sliding_window_pattern {shown(value)}: it must be a whole number of at least 2"
        )
    return value


def _pattern_of(layer_types: Any) -> int:
    """The pattern of a list of attention types, which files may have instead; else the published pattern.

    Whether the list follows that pattern throughout is checked with the other settings.
    """
    types = layer_types if isinstance(layer_types, list) else []
    with_window = types.index("full_attention") if "full_attention" in types else 0
    return with_window + 1 if with_window else 6


_GEMMA3_CLASSES = {34: "Gemma3Config4B", 48: "Gemma3Config12B", 62: "Gemma3Config27B"}


def _gemma3_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    scaling = hf["rope_scaling"] or {"rope_type": "linear", "factor": 1.0}
    if scaling.get("rope_type", scaling.get("type")) != "linear" or scaling.keys() - {"rope_type", "type", "factor"}:
        raise PtqError(f"config.json has rope_scaling {shown(scaling)}; NeMo's Gemma 3 knows type linear with a factor")
    check_number("rope_scaling.factor", scaling.get("factor"))
    check_number("rope_local_base_freq", hf["rope_local_base_freq"], *NUMBER_LIMITS["rotary_base"])
    check_number("query_pre_attn_scalar", hf["query_pre_attn_scalar"])
    check_size("sliding_window", hf["sliding_window"])
    # NeMo's general class lacks fields that it reads; the others are told apart by their layers, as in NeMo's importer.
    return _GEMMA3_CLASSES.get(hf["num_hidden_layers"], "Gemma3Config1B"), {
        "is_vision_language": False,
        "vocab_size": hf["vocab_size"],
        "rotary_base": (hf["rope_local_base_freq"], hf["rope_theta"]),
        "rope_scaling_factor": scaling["factor"],
        "window_size": hf["sliding_window"],
        "interleaved_attn_pattern": (_pattern(hf) - 1, 1),
        "softmax_scale": hf["query_pre_attn_scalar"] ** -0.5,
    }


def _gemma3_settings(nemo: Any) -> dict[str, Any]:
    local_base, global_base = nemo.rotary_base
    factor, scale = nemo.rope_scaling_factor, nemo.softmax_scale
    return {
        "rope_theta": global_base,
        "rope_local_base_freq": local_base,
        "rope_scaling": None if factor == 1 else {"rope_type": "linear", "factor": factor},
        "sliding_window": nemo.window_size,
        "sliding_window_pattern": sum(nemo.interleaved_attn_pattern),
        "query_pre_attn_scalar": nemo.kv_channels if scale is None else _scalar_of(scale),
    }


def _scalar_of(scale: float) -> float:
    """The setting that queries are scaled by, from the scale: the whole number that gave it, if one did."""
    scalar = scale**-2
    return round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-12) else scalar


GEMMA3 = HuggingFaceClass(
    architecture="Gemma3ForCausalLM",
    config_class="Gemma3TextConfig",
    nemo_model=NEMO + "gemma3.Gemma3Model",
    nemo_config=_gemma3_config,
    nemo_settings=_gemma3_settings,
    nemo_fixed=llama_like("gelu") | ZERO_CENTERED,
    defaults=sizes(262208, 2304, 9216, 26, 8, positions=131072, num_key_value_heads=4, head_dim=256, rope_theta=1e6)
    | {"rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_local_base_freq": 10000.0}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "use_bidirectional_attention": False}
    | _ACTIVATION,
    fields=FIELDS,
    fixed=_FIXED
    | {
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    rules=(*_RULES, *QK_NORMS),
    can_tie=True,
    harmless=("sliding_window_pattern", "_sliding_window_pattern"),  # read as they are
    neutral={"use_qk_norm": (True,)},
    layer_types=lambda settings: _windows(settings["num_hidden_layers"], _pattern(settings)),
)

FAMILIES = (
    Family("Gemma", "Gemma", "gemma", "openai-gelu", GEMMA),
    Family("Gemma 2", "Gemma2", "gemma2", "openai-gelu", GEMMA2),
    Family("Gemma 3", "Gemma3", "gemma3", "openai-gelu", GEMMA3),
    Family(
        "Gemma 3 with vision",
        "Gemma3VL",
        None,
        refused="it has an image encoder beside the language model, which alone can be quantized: save that with "
        'transformers, Gemma3ForCausalLM.from_pretrained(DIR, dtype="auto").save_pretrained(NEW), and its tokenizer',
        refused_architectures=("Gemma3ForConditionalGeneration",),
    ),
)
