# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Changes to a config.json, as users and other tools make them: keys taken out, added, and with other values."""

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

_TAKEN_OUT = object()
_FURTHER = (
    *("attention_bias", "attention_multiplier", "clip_qkv", "head_dim", "layer_types", "mlp_bias", "num_local_experts"),
    *("partial_rotary_factor", "rope_parameters", "rope_scaling", "sliding_window", "use_sliding_window", "dtype"),
)
_VALUES = st.one_of(
    st.sampled_from([_TAKEN_OUT, None, True, False, 0, -1, 3, 4, 0.5, 1e6, "silu", "gelu", "bfloat16", "int8", [], {}]),
    st.sampled_from(
        [
            {"rope_type": "yarn", "factor": 2.0},
            {"type": "linear", "factor": 4.0},
            {"type": "linear", "factor": "4"},
            {"rope_type": "default", "rope_theta": 5e5},
            {"rope_type": "llama3", "factor": 8.0},
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            ["full_attention", "full_attention"],
        ]
    ),
)

_GENERATION = (
    *("begin_suppress_tokens", "bos_token_id", "cache_implementation", "compile_config", "do_sample", "eos_token_id"),
    *("early_stopping", "guidance_scale", "length_penalty", "logits_processor", "max_length", "max_new_tokens"),
    *("num_beams", "num_return_sequences", "pad_token_id", "temperature", "top_k", "top_p", "use_cache"),
    *("watermarking_config", "of_a_model_alone"),
)
_GENERATION_VALUES = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 4, 0.7, -0.5, "never", "static", "hybrid", "4", "greedy", [], [1, 2], [None], {}]
)


@st.composite
def changed(draw: st.DrawFn, config: Mapping[str, Any]) -> dict[str, Any]:
    """Draws a config.json with one to three settings that differ.

    Args:
        draw: Of hypothesis.
        config: The one that is changed.
    """
    names = st.sampled_from(sorted({*config, *_FURTHER} - {"architectures", "model_type"}))
    changes = draw(st.dictionaries(names, _VALUES, min_size=1, max_size=3))
    if draw(st.integers(0, 9)) == 9:
        changes["model_type"] = draw(st.sampled_from(["mistral", "llama", "qwen3", "Llama", "", None, _TAKEN_OUT]))
    return _with(config, changes)


@st.composite
def generation(draw: st.DrawFn, config: Mapping[str, Any]) -> dict[str, Any]:
    """Draws a generation_config.json with one to three settings that differ."""
    return _with(
        config, draw(st.dictionaries(st.sampled_from(_GENERATION), _GENERATION_VALUES, min_size=1, max_size=3))
    )


def _with(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**config, **changes}.items() if value is not _TAKEN_OUT}
