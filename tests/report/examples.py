# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Reports for tests, made of nothing but numbers."""

from dataclasses import asdict, replace

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.console.stopwatch import Step
from nemo_ptq.report.advice import findings_of
from nemo_ptq.report.records import ExpertTokens, Layer, MixedPrecision, Quality, Report, Summary
from nemo_ptq.verify.intervals import Interval

KINDS = ("qkv", "proj", "fc1", "fc2")
SCALES = (0.1, 0.4, 0.8, 1.0, 1.2, 2.0, 9.0)


def quality(recovery: float = 0.97) -> Quality:
    """Of a model with this recovery."""
    return Quality(
        source="job",
        text="data/<texts>.jsonl",
        held_out=True,
        documents=8,
        tokens=2040,
        perplexity=Interval(8.0 / recovery, 7.0, 9.0),
        baseline_perplexity=Interval(8.0, 6.9, 8.8),
        recovery=Interval(recovery, recovery - 0.01, recovery + 0.005),
        kl_divergence=Interval(0.02, 0.01, 0.03),
        top1_agreement=Interval(0.93, 0.9, 0.95),
    )


def report(layers: int = 6, algorithm: str = "int4_awq", experts: int = 0) -> Report:
    """A report with everything in it; fc2 of layer 2 has lost much."""
    kinds = ("qkv", "proj", "experts.fc1", "experts.fc2") if experts else KINDS
    records = tuple(
        Layer(
            layer=index,
            kind=kind,
            scheme="W4A16_AWQ",
            weight_sqnr_db=9.5 if (index, kind) == (2, kinds[-1]) else 18.5 + 0.1 * index,
            output_sqnr_db=20.0 - 0.2 * index,
            weight_amax=0.5,
            weight_outlier_ratio=6.0 + index,
            input_outlier_ratio=20.0 * (1 + index),
            pre_quant_scale=SCALES,
        )
        for index in range(layers)
        for kind in kinds
    )
    summary = Summary(
        model="Llama31Config8B",
        checkpoint="/models/llama & co",
        parameters=8_030_261_248,
        layers=layers,
        algorithm=algorithm,
        kv_cache=None,
        checkpoint_bytes=16_060_522_496,
        export_bytes=5_810_000_000,
        compression=16_060_522_496 / 5_810_000_000,
        required_recovery=0.95,
    )
    return Report(
        summary=summary,
        quality=None,
        missing={"quality": "turned off", "activations": "turned off"},
        layers=records,
        experts=tuple(ExpertTokens(index, (0, *range(1, experts))) for index in range(layers)) if experts else (),
        findings=findings_of(records, algorithm),
        steps=(Step("load", 2.25, 3_000_000_000), Step("calibrate", 75.0, 17_000_000_000)),
        command="nemo llm ptq \\\n    nemo_checkpoint='/models/llama & co' \\\n    --yes",
        arguments={
            "forward_loop": None,
            "quantization_config": asdict(QuantizationConfig(algorithm)),
            "export_config": asdict(ExportConfig("/out")),
        },
        versions={"nemo_ptq": "1.2.3", "torch": "2.13.0"},
        files={"rank0.safetensors": {"size": 5_810_000_000, "blake3": "0123456789abcdef" * 4}},
    )


def mixed() -> Report:
    """The report of an export whose first linear layers have other algorithms than the last."""
    whole = report(algorithm="auto")
    schemes: dict[str, str | None] = {"qkv": "FP8", "proj": "FP8", "fc1": "NVFP4", "fc2": None}
    curve = ((4.5, 0.02), (6.0, 0.004), (16.0, 0.0))
    return replace(
        whole,
        layers=tuple(replace(layer, scheme=schemes[layer.kind]) for layer in whole.layers),
        mixed_precision=MixedPrecision(5.98, 0.0041, curve),
    )


def unquantized() -> Report:
    """The report of an export with no_quant."""
    whole = report(algorithm="no_quant")
    layers = tuple(
        Layer(layer.layer, layer.kind, None, weight_amax=0.5, weight_outlier_ratio=6.0) for layer in whole.layers
    )
    summary = replace(whole.summary, required_recovery=None, compression=1.0)
    return replace(whole, summary=summary, layers=layers, findings=())
