# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Llama 1 to 3.3 and CodeLlama; Llama 4 is another model, and refused."""

from collections.abc import Mapping
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.hf_settings import check_number, shown
from nemo_ptq.models.hugging_face import FIELDS, NEMO, WAYS_OUT, HuggingFaceClass, Settings, llama_like, sizes
from nemo_ptq.models.mapping import ATTENTION, EMBEDDING_RULE, GATED_MLP, RMS_NORMS
from nemo_ptq.models.registry import Family

RULES = (EMBEDDING_RULE, *ATTENTION, *GATED_MLP, *RMS_NORMS)

# For each type of rope_scaling NeMo's class and its fields. NeMo's importer keeps nothing but the factor of llama3
# scaling, and nothing at all of linear scaling.
_ROPE_SCALING: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "default": ("LlamaConfig", {}),
    "linear": ("LlamaConfig", {"seq_len_interpolation_factor": "factor"}),
    "llama3": (
        "Llama31Config",
        {
            "scale_factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "old_context_len": "original_max_position_embeddings",
        },
    ),
}
# Settings that transformers ignores, and its files may hold.
_IGNORED = {
    "default": ("factor",),
    "linear": ("original_max_position_embeddings",),
    "llama3": (),
}


def _nemo_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    scaling = hf["rope_scaling"] or {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        raise PtqError(
            f"config.json has rope_scaling of type {shown(kind)}; NeMo's Llama knows {', '.join(_ROPE_SCALING)}"
            f"{WAYS_OUT['rope_scaling']}"
        )
    name, fields = _ROPE_SCALING[kind]
    others = sorted(scaling.keys() - {"type", "rope_type", *fields.values(), *_IGNORED[kind]})
    if others:
        raise PtqError(
            f"config.json has rope_scaling of type {kind!r} with {', '.join(others)}, which it does not have in "
            "transformers: give the config.json that the model was published with"
        )
    for theirs in fields.values():
        if theirs in scaling:
            check_number(f"rope_scaling.{theirs}", scaling[theirs])
    missing = [theirs for theirs in fields.values() if theirs not in scaling]
    if missing:
        raise PtqError(
            f"config.json has rope_scaling of type {kind!r} without {', '.join(missing)}: give the config.json that "
            "the model was published with"
        )
    return name, {"vocab_size": hf["vocab_size"]} | {ours: scaling[theirs] for ours, theirs in fields.items()}


def _nemo_settings(nemo: Any) -> dict[str, Any]:
    for kind, (_, fields) in _ROPE_SCALING.items():
        # Derived classes of NeMo's, such as Llama31Config8B, have the fields of their base.
        values = {theirs: getattr(nemo, ours, None) for ours, theirs in fields.items()}
        if fields and None not in values.values():
            return {"rope_scaling": {"rope_type": kind, **values}}
    return {"rope_scaling": None}


LLAMA = HuggingFaceClass(
    architecture="LlamaForCausalLM",
    config_class="LlamaConfig",
    nemo_model=NEMO + "llama.LlamaModel",
    nemo_config=_nemo_config,
    nemo_settings=_nemo_settings,
    nemo_fixed=llama_like("silu"),
    defaults=sizes(32000, 4096, 11008, 32, 32, positions=2048, rms_norm_eps=1e-6, hidden_act="silu")
    | {"attention_bias": False, "mlp_bias": False},
    fields=FIELDS,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    rules=RULES,
    can_tie=True,
)

FAMILIES = (
    Family("Llama", "Llama", "llama", "silu", LLAMA),
    Family("CodeLlama", "CodeLlama", "llama", "silu", LLAMA),
    Family(
        "Llama 4",
        "Llama4",
        None,
        refused="its layers mix experts that all tokens share with routed ones, and attend in chunks",
        refused_architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    ),
)
