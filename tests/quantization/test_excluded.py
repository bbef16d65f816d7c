# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Patterns of layers to exclude: what each matches, and what is said of one that matches nothing."""

from dataclasses import replace
from typing import Any

import pytest

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.excluded import unquantized_layers
from tests.plan.models import LLAMA_8B, MIXTRAL

SMALL = replace(LLAMA_8B, num_layers=4)
EXPERTS = replace(MIXTRAL, num_layers=2, num_experts=2)
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def excluded(exclude: Any, model: ModelSpec = SMALL) -> set[str]:
    return {
        name.removeprefix("decoder.layers.") for name in unquantized_layers(QuantizationConfig(exclude=exclude), model)
    }


def of(layers: range, *linears: str) -> set[str]:
    return {f"{layer}.{linear}" for layer in layers for linear in linears}


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (None, set()),
        (["*down_proj*"], of(range(4), LINEARS[3])),
        ("*linear_fc2", of(range(4), LINEARS[3])),
        ("[*down_proj, 0]", of(range(4), LINEARS[3]) | of(range(1), *LINEARS)),
        ([0], of(range(1), *LINEARS)),
        (["first2", "last1"], of(range(2), *LINEARS) | of(range(3, 4), *LINEARS)),
        ("last3", of(range(1, 4), *LINEARS)),
        ("*self_attn*", of(range(4), *LINEARS[:2])),
        ("*self_attention*", of(range(4), *LINEARS[:2])),
        ("*q_proj,*k_proj,*v_proj", of(range(4), LINEARS[0])),
        ("model.layers.2.mlp.gate_proj,model.layers.2.mlp.up_proj", of(range(2, 3), LINEARS[2])),
        ("decoder.layers.1.mlp.linear_fc1", of(range(1, 2), LINEARS[2])),
        ("lm_head", set()),
        ("*output_layer*,*embed*", set()),
    ],
)
def test_patterns(exclude: Any, expected: set[str]) -> None:
    assert excluded(exclude) == expected


def test_experts() -> None:
    both = ("mlp.experts.local_experts.0.linear_fc1", "mlp.experts.local_experts.1.linear_fc2")
    assert excluded("*experts*", EXPERTS) >= of(range(2), *both)
    second = excluded("model.layers.1.block_sparse_moe.experts.*", EXPERTS)
    assert second & of(range(2), *both) == of(range(1, 2), *both)
    assert excluded("*gate", EXPERTS) == excluded("*router", EXPERTS) == set()
    assert excluded("1", EXPERTS) > of(range(1, 2), *both)


@pytest.mark.parametrize(
    ("exclude", "model", "message"),
    [
        ("*down_prj*", SMALL, r"exclude=\*down_prj\* matches no layer: did you mean \*down_proj\?"),
        ("down_proj", SMALL, r"exclude=down_proj matches no layer: did you mean \*down_proj\?"),
        ("4", SMALL, "exclude=4 matches no layer: the model has layers 0 to 3"),
        ("first0", SMALL, "exclude=first0 matches no layer: the model has layers 0 to 3"),
        (
            "*router",
            SMALL,
            r"exclude=\*router matches no layer: it has layers called \*down_proj, .*, firstN and",
        ),
        (
            "*q_proj",
            SMALL,
            r"layers\.0\.self_attn\.q_proj without .*k_proj and .*v_proj, which servers load",
        ),
        ("*up_proj,0", SMALL, r"matches model\.layers\.1\.mlp\.up_proj without model\.layers\.1\.mlp\.gate_proj"),
        ("*", SMALL, "leaves no layer to be quantized: use quantization_config.algorithm=no_quant"),
        ("*w2", EXPERTS, "matches some of the experts of layer 0 and not .*0.linear_fc1: servers load them as one"),
        ("*experts.1.*", EXPERTS, "matches some of the experts of layer 0"),
    ],
)
def test_what_cannot_be_excluded(exclude: str, model: ModelSpec, message: str) -> None:
    with pytest.raises(PtqError, match=message):
        excluded(exclude, model)


def test_a_family_without_a_hugging_face_class_has_megatrons_names() -> None:
    other = replace(SMALL, config_class="my.OwnConfig")
    assert excluded("*linear_fc2", other) == of(range(4), LINEARS[3])
    with pytest.raises(PtqError, match=r"matches no layer: did you mean \*linear_proj\?"):
        excluded("*down_proj", other)


def test_a_kv_cache_alone_excludes_everything() -> None:
    found = unquantized_layers(QuantizationConfig(kv_cache_only=True), SMALL)
    assert found == {f"decoder.layers.{name}" for name in of(range(4), *LINEARS)}
