# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rules of algorithm "auto"."""

from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.plan import make_plan
from nemo_ptq.plan.rules.mixed_precision import (
    bits_are_reachable,
    bits_go_with_auto,
    choice_is_rounded_balanced,
    formats_mix,
    state_goes_into_formats,
)
from nemo_ptq.quantization.state_header import StateHeader
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import expect


@pytest.mark.parametrize(
    ("algorithm", "bits", "candidates", "recovery", "message"),
    [
        ("auto", 6.0, None, None, None),
        ("auto", 6.0, "[fp8,nvfp4]", 0.99, None),
        ("auto", None, None, 0.99, None),
        ("fp8", None, None, 0.99, None),
        ("auto", None, None, None, "algorithm=auto needs quantization_config.effective_bits, the bits of a weight on"),
        ("fp8", 6.0, None, None, "quantization_config.effective_bits=6.0 is for algorithm=auto: leave it out"),
        ("my.yaml", None, ["fp8"], None, "quantization_config.candidates=['fp8'] is for algorithm=auto"),
    ],
)
def test_bits_go_with_auto(
    algorithm: str, bits: float | None, candidates: Any, recovery: float | None, message: str | None
) -> None:
    expect(bits_go_with_auto(algorithm, bits, candidates, recovery), message)


@pytest.mark.parametrize(
    ("formats", "candidates", "message"),
    [
        (["hf"], None, None),
        (["hf", "compressed_tensors"], ["nvfp4"], None),
        (["compressed_tensors"], "int4_awq", None),
        (
            ["hf", "trtllm"],
            None,
            "does not go into export_format=trtllm, whose layers are alike: use export_format=hf or",
        ),
        (["nemo"], None, "does not go into export_format=nemo"),
        (["hf"], "[fp8,int4_awq]", "candidates=int4_awq: servers of export_format=hf do not load it side by side"),
        (["compressed_tensors"], "[int8_dynamic,int4_awq]", None),
        (["hf", "compressed_tensors"], "int8_dynamic", "choose from fp8, nvfp4"),
        (["compressed_tensors"], "int8_sq", "choose from fp8, int4_awq, nvfp4, int8_dynamic"),
    ],
)
def test_formats_mix(formats: list[str], candidates: Any, message: str | None) -> None:
    expect(formats_mix("auto", formats, candidates), message)
    assert formats_mix("fp8", formats, None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"algorithm": "int4_awq", "quality": "fast"}, None),
        ({"quality": "fast"}, "since quality=fast was asked for: leave quality out"),
        ({"quality": "fast", "forward_loop": print}, "since a forward_loop does not walk block by block: give"),
        ({"quality": "fast", "calibration_ep": 2}, "calibration_ep=2"),
    ],
)
def test_layers_are_rounded_balanced(changes: dict[str, Any], message: str | None) -> None:
    values = {"quality": "balanced", "algorithm": "auto", "formats": ["hf"], "forward_loop": None}
    values |= {"calibration_tp": 1, "calibration_ep": 1, "model": LLAMA_8B, **changes}
    expect(choice_is_rounded_balanced(**values), message)


@pytest.mark.parametrize(
    ("bits", "formats", "candidates", "message"),
    [
        (4.125, ["compressed_tensors"], None, None),
        (4.12, ["compressed_tensors"], None, "effective_bits=4.12 is less than any choice takes that"),
        (4.5, ["hf"], None, None),
        (4.4, ["hf"], None, "export_format=hf can hold: use at least 4.5"),
        (8.0, ["hf"], "fp8", None),
        (6.0, ["hf"], "fp8", "use at least 8.0"),
    ],
)
def test_bits_are_reachable(bits: float, formats: list[str], candidates: Any, message: str | None) -> None:
    expect(bits_are_reachable(bits, "auto", 128, formats, 1, LLAMA_8B, frozenset(), candidates), message)


def test_a_saved_choice_goes_into_formats_that_mix_it() -> None:
    quantization = QuantizationConfig("auto", "balanced", effective_bits=5.0)
    choice = {"decoder.layers.0.mlp.linear_fc1": "int4_awq", "decoder.layers.0.mlp.linear_fc2": "no_quant"}
    header = StateHeader("/ckpt", "0", {}, "llama", quantization, {}, {}, choice)
    state = Path("OUT")
    assert state_goes_into_formats(header, state, ["compressed_tensors"]) is None
    expect(
        state_goes_into_formats(header, state, ["hf"]), "has layers in int4_awq, which export_format=hf does not mix"
    )


def test_the_plan_says_what_it_costs() -> None:
    export = ExportConfig("OUT", export_format="hf")
    plans = [
        make_plan(LLAMA_8B, QuantizationConfig("auto", effective_bits=bits), export, device="H200")
        for bits in (5.0, 8.0)
    ]
    small, large = (plan.files[-1].bytes for plan in plans)
    linears = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 4096 * 14336)
    assert large - small == pytest.approx(linears * 3 / 8, rel=1e-3)
    fp8 = make_plan(LLAMA_8B, QuantizationConfig("fp8"), export, device="H200")
    assert fp8.flops < plans[0].flops < 4 * fp8.flops
    assert plans[0].ok and plans[0].quality == "balanced"
    aim = ExportConfig("OUT", export_format="hf", min_recovery=0.99)
    unknown = make_plan(LLAMA_8B, QuantizationConfig("auto"), aim, device="H200")
    assert unknown.ok and unknown.files[-1].bytes > large  # it may need all 16 bits
    broken = make_plan(LLAMA_8B, QuantizationConfig("auto", effective_bits=5.0), ExportConfig("OUT"), device="H200")
    assert any("export_format=trtllm, whose layers are alike" in problem for problem in broken.problems)
