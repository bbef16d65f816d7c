# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face directory says of its weights: their data type, and whether they are quantized."""

from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint.huggingface.quantized import check_unquantized
from nemo_ptq.checkpoint.huggingface.stored_tensors import StoredTensor, weights_dtype
from nemo_ptq.errors import PtqError

EMBEDDING = StoredTensor(Path("model.safetensors"), "bfloat16", (8, 4))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "bfloat16"),
        ({"dtype": None, "torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": "auto"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32", "torch_dtype": "float32"}, "float32"),
        ({"dtype": "half"}, "float16"),
    ],
)
def test_the_data_type_has_several_names(settings: dict[str, Any], expected: str) -> None:
    assert weights_dtype(settings, EMBEDDING) == expected


@pytest.mark.parametrize("given", ["float64", "int8", 16, ["float16"]])
def test_another_data_type_is_refused_as_it_is_written(given: Any) -> None:
    with pytest.raises(PtqError) as caught:
        weights_dtype({"dtype": given}, EMBEDDING)
    assert str(caught.value).startswith(f"config.json has dtype {given!r}: import a model in float32, float16, ")
    with pytest.raises(PtqError, match="the weights are float64: import"):
        weights_dtype({}, StoredTensor(EMBEDDING.file, "float64", (8, 4)))


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_quantization_is_none(nothing: Any, tmp_path: Path) -> None:
    check_unquantized(tmp_path, {"quantization_config": nothing, "compression_config": nothing})
    with pytest.raises(PtqError, match=r"is quantized already .*has a compression_config of gptq"):
        check_unquantized(tmp_path, {"quantization_config": nothing, "compression_config": {"quant_method": "gptq"}})
