# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Composes the report of a job from its measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_ptq.config import BALANCED, FAST
from nemo_ptq.console.stopwatch import Step
from nemo_ptq.home import without_home
from nemo_ptq.job import Job
from nemo_ptq.quantization.algorithms import algorithm_of
from nemo_ptq.report.advice import findings_of
from nemo_ptq.report.command import reproducing_command
from nemo_ptq.report.metrics import expert_records
from nemo_ptq.report.records import Layer, MixedPrecision, Quality, Report, Serving, Summary, TaskFigure
from nemo_ptq.report.words import verdict
from nemo_ptq.verify.evaluate import DocumentScore, summarize

# By the quality that a job had.
_HIGHER_QUALITY = {FAST: "quantization_config.quality=balanced, ", BALANCED: "quantization_config.quality=max, "}
_GENERAL_ADVICE = "another algorithm, or quantization_config.exclude for the layers that the report shows to lose most"


@dataclass(frozen=True)
class Observations:
    """Measurements of a job, apart from its files.

    Attributes:
        layers: Each linear layer.
        quality: Quantized against unquantized.
        missing: Why figures are missing, by "quality" or "activations".
        expert_tokens: Calibration tokens by (layer, expert).
        mixed_precision: The choice for the layers, with algorithm "auto".
    """

    layers: tuple[Layer, ...] = ()
    quality: Quality | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    expert_tokens: Mapping[tuple[int, int], int] = field(default_factory=dict)
    mixed_precision: MixedPrecision | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its export.

    Attributes:
        parameters: Parameters of the whole model.
        checkpoint_bytes: Size of the model's weights in the checkpoint.
        export_bytes: Size of the exported files, without ptq/ and nemo_context/.
    """

    parameters: int
    checkpoint_bytes: int
    export_bytes: int


def compose(
    job: Job,
    observations: Observations,
    sizes: Sizes,
    steps: Sequence[Step],
    versions: Mapping[str, str],
    files: Mapping[str, Mapping[str, Any]],
    world_size: int,
    servers: Sequence[Serving] = (),
) -> Report:
    """Composes the report of a job.

    Args:
        job: The job.
        observations: The measurements.
        sizes: Sizes of the checkpoint and the export.
        steps: Time and memory of each step.
        versions: Versions of the packages.
        files: Size and BLAKE3 of the files written so far, by relative path.
        world_size: Number of processes.
        servers: What each server does with the directory.
    """
    algorithm = algorithm_of(job.quantization)
    summary = Summary(
        model=job.metadata.config_class.rpartition(".")[2],
        checkpoint=without_home(str(job.checkpoint)),
        parameters=sizes.parameters,
        layers=job.metadata.num_layers,
        algorithm=algorithm.name,
        kv_cache=job.quantization.kv_cache_qformat if job.quantizes_kv_cache and algorithm.quantizes else None,
        checkpoint_bytes=sizes.checkpoint_bytes,
        export_bytes=sizes.export_bytes,
        compression=sizes.checkpoint_bytes / sizes.export_bytes,
        required_recovery=(algorithm.required_recovery if job.export.min_recovery is None else job.export.min_recovery),
        quality=job.quantization.quality or FAST,
    )
    report = Report(
        summary=summary,
        quality=None,
        missing=observations.missing,
        layers=observations.layers,
        experts=expert_records(observations.expert_tokens),
        findings=findings_of(
            observations.layers, algorithm.name, job.quantization.is_balanced, job.quantization.is_max
        ),
        steps=tuple(steps),
        command=reproducing_command(job.arguments, world_size),
        arguments=job.arguments,
        versions=versions,
        files=files,
        servers=tuple(servers),
        mixed_precision=observations.mixed_precision,
    )
    return report if observations.quality is None else with_quality(report, observations.quality)


def quality_of(
    scores: Sequence[DocumentScore], source: str, text: str, held_out: bool | None, has_baseline: bool = True
) -> Quality:
    """Sums up the scores of documents, with intervals.

    Args:
        scores: One for each document, at least one.
        source: "job" or "evaluate".
        text: Data set or file of the documents.
        held_out: Whether the job did not calibrate on them; None if unknown.
        has_baseline: Whether there was a model to compare with.
    """
    found = summarize(scores)
    quality = Quality(source, text, held_out, len(scores), sum(score.tokens for score in scores), found.perplexity)
    if not has_baseline:
        return quality
    return replace(
        quality,
        baseline_perplexity=found.baseline_perplexity,
        recovery=found.recovery,
        kl_divergence=found.kl_divergence,
        top1_agreement=found.top1_agreement,
    )


def describe(quality: Quality) -> str:
    """One line for the terminal."""
    text = "held-out documents" if quality.held_out else "documents"
    line = f"perplexity {quality.perplexity.value:.3f}"
    if quality.baseline_perplexity is not None and quality.recovery is not None:
        line += f", unquantized {quality.baseline_perplexity.value:.3f}, recovery {quality.recovery.value:.4f}"
    return f"{line} on {quality.documents} {text}"


def conclude(report: Report) -> tuple[str, bool]:
    """Returns what the report says in one line for the terminal, and whether it is bad."""
    summary = report.summary
    word, is_bad = verdict(summary)
    if summary.passed is None:
        why = report.missing.get("quality")
        return (f"{word}: {why}" if why else word), False
    line = f"{word}: recovery {summary.recovery:.4f}, at least {summary.required_recovery:g} required"
    if not is_bad:
        return line, False
    if not report.findings:
        return f"{line}; try {_HIGHER_QUALITY.get(summary.quality, '')}{_GENERAL_ADVICE}", True
    first = report.findings[0]
    return f"{line}; {first.kind} of layer {first.layer}: {first.problem}; try {first.advice}", True


def with_quality(report: Report, quality: Quality) -> Report:
    """The same report with other figures of quality, in the summary as well."""
    recovery = None if quality.recovery is None else quality.recovery.value
    required = report.summary.required_recovery
    summary = replace(
        report.summary,
        perplexity=quality.perplexity.value,
        baseline_perplexity=None if quality.baseline_perplexity is None else quality.baseline_perplexity.value,
        recovery=recovery,
        kl_divergence=None if quality.kl_divergence is None else quality.kl_divergence.value,
        top1_agreement=None if quality.top1_agreement is None else quality.top1_agreement.value,
        passed=None if recovery is None or required is None else recovery >= required,
    )
    missing = {figure: reason for figure, reason in report.missing.items() if figure != "quality"}
    return replace(report, summary=summary, quality=quality, missing=missing)


def with_tasks(report: Report, figures: Sequence[TaskFigure]) -> Report:
    """The same report with figures of tasks, in the place of those that it has of the same tasks."""
    measured = {figure.task for figure in figures}
    return replace(report, tasks=(*(old for old in report.tasks if old.task not in measured), *figures))
