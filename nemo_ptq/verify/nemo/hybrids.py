# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Hybrids with state spaces in NeMo 2.0 checkpoints: what their layers are, and which tensors these have."""

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.model_config import Hybrid


def hybrid_of(model: Mapping[str, Any]) -> Hybrid | None:
    """Says what the layers are, where they are of several kinds.

    Args:
        model: The configuration in a context's model.yaml.

    Raises:
        PtqError: If it is of a hybrid that is not computed.
    """
    pattern, layers = model.get("hybrid_override_pattern"), model["num_layers"]
    if pattern is None:
        return None
    if not isinstance(pattern, str) or len(pattern) != layers or not set(pattern) <= set("M*-"):
        raise PtqError(
            f"context/model.yaml has hybrid_override_pattern {pattern!r:.60}, expected M, * or - for each layer"
        )
    if model["normalization"] != "RMSNorm" or model["gated_linear_unit"]:
        raise PtqError(
            "context/model.yaml is of a hybrid with LayerNorm or a gated MLP, which the reader does not compute"
        )
    size = model["mamba_head_dim"]
    heads = model.get("mamba_num_heads") or 2 * model["hidden_size"] // size
    return Hybrid(pattern, heads, size, model["mamba_state_dim"], model["mamba_num_groups"])


def state_space_weights(hybrid: Hybrid, hidden_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the weights of a layer with a state space by their names in it; groups of rows are stored apart."""
    inner, projected = hybrid.inner_size, hybrid.groups * hybrid.state_size
    channels = {"x": inner, "B": projected, "C": projected}
    yield "mixer.in_proj.layer_norm_weight", (hidden_size,)
    for rows, count in {"z": inner, **channels, "dt": hybrid.heads}.items():
        yield f"mixer.in_proj.weight.{rows}", (count, hidden_size)
    for rows, count in channels.items():
        yield f"mixer.conv1d.weight.{rows}", (count, 1, hybrid.kernel)
        yield f"mixer.conv1d.bias.{rows}", (count,)
    for name in ("A_log", "D", "dt_bias"):
        yield f"mixer.{name}", (hybrid.heads,)
    yield "mixer.norm.weight", (inner,)
    yield "mixer.out_proj.weight", (hidden_size, inner)
