# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Other tools beside ours in the quality benchmark: what they write is read back exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.other_tools import TOOLS
from benchmarks.quality_peers import Peers, is_gptq, unpack_gptq
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.quantization.algorithms import algorithm_of


def packed(codes: torch.Tensor) -> torch.Tensor:
    """int32 (n / 8, m) from codes (n, m) of 0 to 15, the first one in the lowest bits."""
    words = sum(codes[place::8].long() << (4 * place) for place in range(8))
    return torch.as_tensor(words).where(torch.as_tensor(words) < 1 << 31, words - (1 << 32)).int()


@pytest.mark.parametrize(("version", "stored_zero"), [("gptq", 7), ("gptq_v2", 8)])
def test_gptq_s_format_is_dequantized(version: str, stored_zero: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (32, 8), generator=generator)  # (in, out)
    scales = torch.rand(2, 8, generator=generator).half()
    groups = torch.arange(32) % 2  # columns need not be in order
    save_file(
        {
            "model.layers.0.mlp.up_proj.qweight": packed(codes),
            "model.layers.0.mlp.up_proj.qzeros": packed(torch.full((8, 2), stored_zero)).T.contiguous(),
            "model.layers.0.mlp.up_proj.scales": scales,
            "model.layers.0.mlp.up_proj.g_idx": groups.int(),
            "model.norm.weight": torch.ones(8),
        },
        tmp_path / "model.safetensors",
    )
    quantization = {"quant_method": "gptq", "bits": 4, "checkpoint_format": version}
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "quantization_config": quantization}))
    assert is_gptq(tmp_path)
    unpack_gptq(tmp_path)
    assert not is_gptq(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}
    expected = (codes - 8) * torch.stack([scales[group] for group in groups]).float()
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], expected.T)


def test_tools_have_algorithms_of_ours() -> None:
    for tool in TOOLS.values():
        assert all(algorithm_of(QuantizationConfig(name)).quantizes for name in tool.algorithms)
    peers = Peers(("gptqmodel", "auto-round"), "python", "model", "cpu")
    assert peers.having("int4_awq") == ["gptqmodel", "auto-round"]
    assert peers.having("fp8") == []


def test_a_tool_that_is_not_installed_is_named() -> None:
    with pytest.raises(SystemExit, match=r"nothing-like-it: not installed in .*; known: modelopt, auto-round"):
        Peers.of(["nothing-like-it"], "python", "model", "cpu", ["modelopt"])
