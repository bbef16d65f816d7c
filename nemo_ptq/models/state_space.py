# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Hybrids of Mamba-2: layers with a state space, with attention or with an MLP, one of the three in each layer.

Names are Megatron's. Imports nothing heavy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.layers import LayerSpec, ModuleSpec, attention_modules, mlp_modules

if TYPE_CHECKING:
    from nemo_ptq.models.spec import ModelSpec

STATE_SPACE, ATTENTION, MLP = "M", "*", "-"
"""The kinds of layers in ``hybrid_override_pattern``, one character a layer."""
CONV_KERNEL = 4
"""Positions that the convolution of a state space covers: Megatron supports no other number."""
STATE_PARAMETERS = ("A_log", "D", "dt_bias")
"""Parameters of a state space itself, one number a head. They stay in float32."""
# Characters of a pattern that a message shows.
_SHOWN = 40


@dataclass(frozen=True)
class StateSpace:
    """The kinds of a hybrid's layers, and the sizes of those with a state space.

    Attributes:
        pattern: The kind of each layer: :data:`STATE_SPACE`, :data:`ATTENTION` or :data:`MLP`.
        heads: Heads of a state space.
        head_size: Channels of each of them.
        state_size: Width of the state of each channel.
        groups: Groups of heads that share the projections B and C of the state, and a group of the gated norm.
    """

    pattern: str
    heads: int
    head_size: int
    state_size: int
    groups: int

    @property
    def inner_size(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_size

    @property
    def conv_rows(self) -> dict[str, int]:
        """Channels of the convolution: the input of the state space, and its projections B and C."""
        projected = self.groups * self.state_size
        return {"x": self.inner_size, "B": projected, "C": projected}

    @property
    def in_rows(self) -> dict[str, int]:
        """Rows of ``in_proj``: the gate, what the convolution takes, and the time step of each head."""
        return {"z": self.inner_size, **self.conv_rows, "dt": self.heads}

    @property
    def rows(self) -> dict[str, dict[str, int]]:
        """Groups of rows that are cut for tensor parallelism one by one, by the name of the module within a layer."""
        return {"mixer.in_proj": self.in_rows, "mixer.conv1d": self.conv_rows}


def state_space_of(config: Mapping[str, Any]) -> StateSpace | None:
    """Reads a hybrid's description from NeMo's configuration; None for a model without state spaces.

    Raises:
        PtqError: If the pattern is not one of M, * and - for each layer, or sizes do not divide one another.
    """
    pattern, layers = config.get("hybrid_override_pattern"), config["num_layers"]
    if pattern is None:
        return None
    if not isinstance(pattern, str) or len(pattern) != layers or not set(pattern) <= {STATE_SPACE, ATTENTION, MLP}:
        raise PtqError(
            f"hybrid_override_pattern is {repr(pattern)[:_SHOWN]}: it must have one of {STATE_SPACE}, {ATTENTION} and "
            f"{MLP} for each of {layers} layers"
        )
    head_size, groups = config.get("mamba_head_dim") or 64, config.get("mamba_num_groups") or 8
    heads = config.get("mamba_num_heads") or 2 * config["hidden_size"] // head_size
    if not heads or heads % groups:
        raise PtqError(f"mamba_num_groups is {groups}, which does not divide {heads} heads of the state space")
    return StateSpace(pattern, heads, head_size, config.get("mamba_state_dim") or 128, groups)


def hybrid_layers(model: "ModelSpec") -> Sequence[LayerSpec]:
    """Describes the layers of a hybrid; those of one kind are one object."""
    assert model.state_space is not None
    kinds = {
        STATE_SPACE: LayerSpec(_state_space_modules(model, model.state_space)),
        ATTENTION: LayerSpec(attention_modules(model)),
        MLP: LayerSpec(mlp_modules(model)),
    }
    return tuple(kinds[kind] for kind in model.state_space.pattern)


def _state_space_modules(model: "ModelSpec", sizes: StateSpace) -> tuple[ModuleSpec, ...]:
    hidden, inner = model.hidden_size, sizes.inner_size
    return (
        ModuleSpec("norm", "norm", {"": hidden}),
        ModuleSpec("mixer.in_proj", "linear", sizes.in_rows, hidden, 0, norm="norm"),
        ModuleSpec("mixer.conv1d", "conv", sizes.conv_rows, 1, 0, has_bias=True, kernel=CONV_KERNEL),
        ModuleSpec("mixer", "state", {"": sizes.heads}, axis=0, parameters=STATE_PARAMETERS),
        ModuleSpec("mixer.norm", "norm", {"": inner}, axis=0),
        ModuleSpec("mixer.out_proj", "linear", {"": hidden}, inner, 1, norm="mixer.norm"),
    )
