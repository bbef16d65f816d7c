# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The report as plain records: ptq/report.json is these dataclasses, field by field. docs/report.md describes them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.config import FAST
from nemo_ptq.console.stopwatch import Step
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_json
from nemo_ptq.verify.intervals import Interval

VERSION = 1
"""Of the schema. A key's meaning changes only together with this number; new keys may come without."""
# Of a list in a report from outside, all of which is drawn: the largest models have some hundred layers.
_MOST_ENTRIES = 20_000


@dataclass(frozen=True)
class Quality:
    """The quantized model against the unquantized one, on the same text.

    Attributes:
        source: "job": from the calibrated Megatron model; "evaluate": from the exported files.
        text: Data set or file that the documents come from.
        held_out: Whether the job did not calibrate on these documents; None if unknown.
        documents: Number of documents.
        tokens: Predictions over all of them.
        perplexity: Perplexity of the quantized model.
        baseline_perplexity: Perplexity of the unquantized model; None if only the quantized one was run.
        recovery: baseline_perplexity / perplexity: 1 is lossless.
        kl_divergence: KL(unquantized || quantized) in nats per token.
        top1_agreement: Share of predictions, 0 to 1, in which both models rank the same token first.
    """

    source: str
    text: str
    held_out: bool | None
    documents: int
    tokens: int
    perplexity: Interval
    baseline_perplexity: Interval | None = None
    recovery: Interval | None = None
    kl_divergence: Interval | None = None
    top1_agreement: Interval | None = None


@dataclass(frozen=True)
class TaskFigure:
    """A figure of one of lm-evaluation-harness's tasks, computed from the exported files.

    Attributes:
        task: The task's name.
        metric: The harness's name of the figure, such as "acc"; with its filter where that is not "none".
        value: The figure of the quantized model.
        standard_error: Its standard error; None where the harness gives none.
        baseline: The same figure of the unquantized model; None where that was not run.
        documents: Number of documents of the task.
        shots: Number of solved examples before each.
        higher_is_better: Whether a larger figure is better; None where the task does not say.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None = None
    baseline: float | None = None
    documents: int = 0
    shots: int = 0
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Layer:
    """One linear layer of the model, or the same one of all experts of a layer taken together.

    Ratios are over all ranks that hold a part of it. What was not quantized, or not measured, is None.

    Attributes:
        layer: Index of the transformer layer, from 0 through the whole model.
        kind: "qkv", "proj", "fc1", "fc2"; of experts "experts.fc1", "experts.fc2"; of state spaces "in_proj",
            "out_proj".
        scheme: TensorRT-LLM's name of how it is quantized, such as "FP8".
        weight_sqnr_db: Signal to quantization noise of the weights, in dB: 10 log10(sum w^2 / sum (w - Q(w))^2).
        input_sqnr_db: The same of the activations that enter, after their pre-quantization scale.
        output_sqnr_db: The same of the layer's output, quantized against unquantized, for the same input.
        weight_amax: Largest magnitude of a weight, as quantized: after smoothing.
        weight_outlier_ratio: weight_amax over the weights' root mean square.
        input_amax: The calibrated amax: the magnitude that the input's largest code stands for.
        input_outlier_ratio: Largest magnitude over root mean square of the inputs of the evaluated text, after their
            pre-quantization scale.
        pre_quant_scale: The input channels' pre-quantization scales at :data:`QUANTILES`.
        rounding: "nearest": each weight to the nearest code; "gptq": by what the calibration data shows.
    """

    layer: int
    kind: str
    scheme: str | None
    weight_sqnr_db: float | None = None
    input_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    weight_amax: float | None = None
    weight_outlier_ratio: float | None = None
    input_amax: float | None = None
    input_outlier_ratio: float | None = None
    pre_quant_scale: tuple[float, ...] | None = None
    rounding: str | None = None


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Where distributions are given."""


@dataclass(frozen=True)
class ExpertTokens:
    """How often calibration went through each expert of one layer: tokens by expert."""

    layer: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """A layer that stands out, and what to try.

    Attributes:
        layer: Index of the layer.
        kind: As in :class:`Layer`.
        figure: The field that is out of bounds.
        value: Value of that field.
        limit: Lower bound of the value.
        problem: The problem, in words.
        advice: What to try.
    """

    layer: int
    kind: str
    figure: str
    value: float
    limit: float
    problem: str
    advice: str


@dataclass(frozen=True)
class MixedPrecision:
    """What algorithm "auto" has chosen: :class:`Layer` says how each layer is quantized.

    Attributes:
        effective_bits: Bits of a weight on average over the layers that were chosen for, the scales of blocks counted.
        error: What the choice was predicted to change: the sum over the layers of the mean relative squared change of
            the hidden states behind their block.
        curve: Effective bits and error of other choices, each the best for its bits, from the fewest bits.
    """

    effective_bits: float
    error: float
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Summary:
    """The most important figures.

    Attributes:
        model: NeMo's config class, such as "Llama31Config8B".
        checkpoint: Path of the unquantized checkpoint.
        parameters: Parameters of the whole model.
        layers: Transformer layers.
        algorithm: Our name of the algorithm.
        kv_cache: Format of the KV cache, such as "fp8"; None where it is not quantized.
        checkpoint_bytes: The model's weights in the checkpoint.
        export_bytes: The exported files, but those of ptq/ and nemo_context/.
        compression: checkpoint_bytes / export_bytes.
        perplexity: Quantized, from :class:`Quality`, as are the next ones.
        baseline_perplexity: Unquantized.
        recovery: baseline_perplexity / perplexity.
        kl_divergence: Nats per token.
        top1_agreement: 0 to 1.
        required_recovery: The least recovery that passes for this algorithm; None where there is no such limit.
        passed: False where the recovery is too small, True where it suffices, None where it was not measured. A
            directory that does not pass its verification never appears, whatever its recovery.
        quality: "fast", "balanced" or "max".
    """

    model: str
    checkpoint: str
    parameters: int
    layers: int
    algorithm: str
    kv_cache: str | None
    checkpoint_bytes: int
    export_bytes: int
    compression: float
    perplexity: float | None = None
    baseline_perplexity: float | None = None
    recovery: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    required_recovery: float | None = None
    passed: bool | None = None
    quality: str = FAST


@dataclass(frozen=True)
class Serving:
    """What a version of a server does with the directory.

    Attributes:
        server: The server and its version.
        outcome: "loads", "refused" or "unknown".
        known_by: How that is known; empty if it is not.
        note: A note for the user.
        commands: Shell commands that serve the directory; none where it is not the newest version that is known, does
            not load it, or has no command.
    """

    server: str
    outcome: str
    known_by: str
    note: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything about one run.

    Attributes:
        summary: The figures that one looks at first.
        quality: Quantized against unquantized; None where it was not measured.
        missing: Why figures are missing, by "quality" or "activations".
        layers: Each linear layer of the transformer layers.
        experts: Token counts of mixtures of experts.
        findings: Layers that stand out.
        steps: Time and memory; each the largest of any rank.
        command: A command line that repeats the run; None where arguments came from Python only.
        arguments: All arguments of the task, nested as its configs are.
        versions: Versions of the packages.
        files: Size and BLAKE3 of every other file of the directory but the manifest, by relative path.
        version: Version of this schema.
        servers: What each server that reads the format does with the directory.
        mixed_precision: What was chosen for the layers; None where they are quantized alike, or the calibration is that
            of a file.
        tasks: Results of `nemo-ptq evaluate --tasks`.
    """

    summary: Summary
    quality: Quality | None
    missing: Mapping[str, str]
    layers: tuple[Layer, ...]
    experts: tuple[ExpertTokens, ...]
    findings: tuple[Finding, ...]
    steps: tuple[Step, ...]
    command: str | None
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    version: int = VERSION
    servers: tuple[Serving, ...] = ()
    mixed_precision: MixedPrecision | None = None
    tasks: tuple[TaskFigure, ...] = ()


def to_json(report: Report) -> str:
    """Writes a report as JSON, its keys in the order of the fields."""
    fields = asdict(report)
    return json.dumps({"version": fields.pop("version"), **fields}, indent=2, allow_nan=False) + "\n"


def read_report(file: Path) -> Report:
    """Reads a report.json.

    Raises:
        PtqError: If it is not one of this version.
    """
    try:
        raw = read_json(file)
        if raw["version"] != VERSION:
            raise PtqError(f"{file}: version is {raw['version']!r}, this nemo_ptq reads version {VERSION}")
        if (longest := _longest_list(raw)) > _MOST_ENTRIES:
            raise PtqError(f"{file} has a list of {longest} entries, and no report has more than {_MOST_ENTRIES}")
        return Report(
            **raw
            | {
                "summary": Summary(**raw["summary"]),
                "quality": _quality(raw["quality"]),
                "layers": tuple(Layer(**layer) for layer in raw["layers"]),
                "experts": tuple(ExpertTokens(**experts) for experts in raw["experts"]),
                "findings": tuple(Finding(**finding) for finding in raw["findings"]),
                "steps": tuple(Step(**step) for step in raw["steps"]),
                "mixed_precision": _mixed_precision(raw.get("mixed_precision")),
                "tasks": tuple(TaskFigure(**task) for task in raw.get("tasks", ())),
                "servers": tuple(
                    Serving(**{**server, "commands": tuple(server["commands"])}) for server in raw.get("servers", ())
                ),
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PtqError(f"{file} is no report of nemo_ptq: {error}") from error


def _mixed_precision(raw: dict[str, Any] | None) -> MixedPrecision | None:
    return None if raw is None else MixedPrecision(**{**raw, "curve": tuple(map(tuple, raw["curve"]))})


def _quality(raw: dict[str, Any] | None) -> Quality | None:
    if raw is None:
        return None
    fields: dict[str, Any] = {
        name: Interval(**value) if isinstance(value, dict) else value for name, value in raw.items()
    }
    return Quality(**fields)


def _longest_list(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max([len(value) if isinstance(value, list) else 0, *map(_longest_list, inner)])
