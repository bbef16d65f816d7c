# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Phi 3 and 4: Llama's layers, whose queries, keys and values are one tensor, and so are gate and up projection."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from nemo_ptq.errors import PtqError
from nemo_ptq.models.hf_settings import check_number, check_size, shown, with_one_spelling
from nemo_ptq.models.hugging_face import (
    FIELDS,
    NEMO,
    WAYS_OUT,
    HuggingFaceClass,
    Settings,
    llama_like,
    sizes,
    sliding_window_fields,
    sliding_window_setting,
)
from nemo_ptq.models.mapping import EMBEDDING_RULE, GATED, LAYER, QKV, RMS_NORMS, without_bias
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import LongRope

_LENGTH = "original_max_position_embeddings"
_FACTORS = ("short_factor", "long_factor")


def _one_spelling(content: Settings) -> dict[str, Any]:
    """Writes longrope as transformers 4 does: a type and two lists, with the length that they are for beside them."""
    settings = dict(content)
    for name in ("rope_parameters", "rope_scaling"):
        if _is_longrope(fields := settings.get(name)) and _LENGTH in fields:
            settings[name] = {field: value for field, value in fields.items() if field != _LENGTH}
            if settings.setdefault(_LENGTH, fields[_LENGTH]) != fields[_LENGTH]:
                raise PtqError(
                    f"config.json has {_LENGTH} {shown(settings[_LENGTH])} and, for the rotary embedding, "
                    f"{shown(fields[_LENGTH])}: leave the one that the model was trained with"
                )
    settings = with_one_spelling(settings)
    if _is_longrope(scaling := settings.get("rope_scaling")):
        others = {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
        settings["rope_scaling"] = {"type": "longrope", **others}
    return settings


def _is_longrope(fields: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(fields, Mapping) and fields.get("rope_type", fields.get("type")) == "longrope"


def _nemo_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    # NeMo's importer drops the window, the query groups, the share of a head that is rotated and longrope.
    fields = {} if hf["sliding_window"] is None else sliding_window_fields(hf)
    return "Phi3Config", fields | ({} if hf["rope_scaling"] is None else {"long_rope": _long_rope(hf)})


def _long_rope(hf: Settings) -> LongRope:
    scaling, context = hf["rope_scaling"], hf[_LENGTH]
    if (kind := scaling.get("rope_type", scaling.get("type"))) != "longrope":
        hint = ": early files call longrope su, write longrope" if kind == "su" else WAYS_OUT["rope_scaling"]
        raise PtqError(f"config.json has rope_scaling of type {shown(kind)}; Phi 3 and 4 know longrope{hint}")
    if others := sorted(scaling.keys() - {"type", *_FACTORS}):
        raise PtqError(
            f"config.json has rope_scaling of type 'longrope' with {', '.join(others)}, which Phi 3 and 4 do not have: "
            "give the config.json that the model was published with"
        )
    head_size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    count = int(head_size * hf["partial_rotary_factor"]) // 2
    for name in _FACTORS:
        factors = scaling.get(name)
        if not isinstance(factors, list) or len(factors) != count:
            raise PtqError(
                f"config.json has rope_scaling with {name} {shown(factors)}: it must be a list of {count} numbers, one "
                "for every two elements of a head that are rotated"
            )
        for factor in factors:
            check_number(f"rope_scaling.{name}", factor)
    check_size(_LENGTH, context)
    check_number(_LENGTH, context, above=1.0)
    extension = hf["max_position_embeddings"] / context
    attention_factor = math.sqrt(1 + math.log(extension) / math.log(context)) if extension > 1 else 1.0
    return LongRope(tuple(scaling["short_factor"]), tuple(scaling["long_factor"]), context, attention_factor)


PHI3 = HuggingFaceClass(
    architecture="Phi3ForCausalLM",
    config_class="Phi3Config",
    nemo_model=NEMO + "phi3mini.Phi3Model",
    nemo_config=_nemo_config,
    nemo_settings=sliding_window_setting,
    nemo_fixed=llama_like("silu"),
    defaults=sizes(32064, 3072, 8192, 32, 32, positions=4096, sliding_window=None)
    | {
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
    },
    fields=FIELDS | {"rotary_percent": "partial_rotary_factor"},
    fixed={"hidden_act": ("silu",)},
    rules=(
        EMBEDDING_RULE,
        *without_bias("decoder.layers.self_attention.linear_qkv.", dict.fromkeys(QKV, LAYER + "self_attn.qkv_proj")),
        *without_bias("decoder.layers.self_attention.linear_proj.", LAYER + "self_attn.o_proj"),
        *without_bias("decoder.layers.mlp.linear_fc1.", dict.fromkeys(GATED, LAYER + "mlp.gate_up_proj")),
        *without_bias("decoder.layers.mlp.linear_fc2.", LAYER + "mlp.down_proj"),
        *RMS_NORMS,
    ),
    can_tie=True,
    one_spelling=_one_spelling,
    # Of published files, and not read by transformers.
    neutral={"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
)

FAMILIES = (Family("Phi 3", "Phi3", "llama", "silu", PHI3),)
