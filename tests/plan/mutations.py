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


@st.composite
def changed(draw: st.DrawFn, config: Mapping[str, Any]) -> dict[str, Any]:
    """Draws a config.json with one to three settings that differ.

    Args:
        draw: Of hypothesis.
        config: The one that is changed.
    """
    names = st.sampled_from(sorted({*config, *_FURTHER} - {"architectures", "model_type"}))
    changes = draw(st.dictionaries(names, _VALUES, min_size=1, max_size=3))
    return {name: value for name, value in {**config, **changes}.items() if value is not _TAKEN_OUT}
