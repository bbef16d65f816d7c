# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The report as documents: one self-contained HTML page, and a model card."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from nemo_ptq.config import MAX, NO_QUANT
from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.algorithms import algorithm_named
from nemo_ptq.report import markdown, plots, words
from nemo_ptq.report.records import Finding, Layer, Report, Summary

_FIGURES = {
    "weight_sqnr_db": "weights",
    "input_sqnr_db": "inputs",
    "output_sqnr_db": "outputs",
}


@dataclass(frozen=True)
class Group:
    """Layers of one kind that break the same rule, for one paragraph.

    Attributes:
        kind: Their kind, in words.
        layers: Their indices, in words.
        figure: What is out of bounds, in words.
        worst: The finding that is furthest out.
        problem: What is wrong.
        advice: What to try.
    """

    kind: str
    layers: str
    figure: str
    worst: Finding
    problem: str
    advice: str


def grouped(findings: Sequence[Finding]) -> list[Group]:
    """Puts findings of one rule and kind together, in the order of the worst of each."""
    together: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        together[finding.kind, finding.figure, finding.advice].append(finding)
    return [
        Group(
            words.kind_name(kind),
            words.index_ranges([finding.layer for finding in found]),
            _FIGURES.get(figure, figure),
            found[0],
            found[0].problem,
            advice,
        )
        for (kind, figure, advice), found in together.items()
    ]


def is_bad(report: Report, layer: Layer, figure: str) -> bool:
    """Whether a finding names a layer's figure."""
    return any((f.layer, f.kind, f.figure) == (layer.layer, layer.kind, figure) for f in report.findings)


def headline(summary: Summary) -> str:
    """The outcome in one sentence."""
    if summary.algorithm == NO_QUANT:
        return "Exported unquantized: nothing is lost, and nothing is saved."
    size = f"{summary.compression:.2f} times smaller" if summary.compression > 1 else "no smaller"
    if summary.recovery is None or summary.perplexity is None:
        return f"{size[0].upper()}{size[1:]}. Quality was not measured."
    change = 100 * (1 / summary.recovery - 1)
    if abs(change) < 0.005:
        return f"{size[0].upper()}{size[1:]}, with the perplexity of the unquantized model."
    return f"{size[0].upper()}{size[1:]}, with a perplexity {abs(change):.2g} % {'higher' if change > 0 else 'lower'}."


@cache
def make_environment() -> Environment:
    """Returns what renders the templates, with filters for numbers."""
    environment = Environment(
        loader=PackageLoader("nemo_ptq.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": markdown.code,
        "plain": markdown.plain,
        "fence": markdown.fence,
        "bytes": words.human_bytes,
        "count": words.human_count,
        "seconds": words.seconds,
        "kind": words.kind_name,
        "number": lambda value, digits=2: "" if value is None else f"{value:,.{digits}f}",
        "figures": lambda value: "" if value is None else f"{value:.4g}",
    }
    return environment


def make_chart(name: str, figure: Figure | None, label: str) -> Markup:
    """A chart that says to those who do not see it what it shows; the tables have its numbers."""
    if figure is None:
        return Markup("")
    opening = Markup('<svg role="img" aria-label="{}"').format(label)
    return Markup(plots.to_svg(figure, name).replace("<svg", opening, 1))


def _label(algorithm: str) -> str:
    try:
        return algorithm_named(algorithm).label
    except PtqError:  # the report is of a plugin's algorithm, which is not loaded now
        return algorithm


def _is_calibrated(algorithm: str) -> bool:
    try:
        return algorithm_named(algorithm).needs_data
    except PtqError:
        return True


def _chooses(algorithm: str) -> bool:
    try:
        return algorithm_named(algorithm).chooses
    except PtqError:
        return False


def schemes_of(layers: Sequence[Layer]) -> list[tuple[str, list[str]]]:
    """Which layers each scheme has, in words: the scheme, and a line for each kind of layer."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        found[layer.scheme or "unquantized"][layer.kind].append(layer.layer)
    return [
        (scheme, [f"{words.kind_name(kind)}: {words.index_ranges(indices)}" for kind, indices in kinds.items()])
        for scheme, kinds in sorted(found.items())
    ]


def _rounding_note(report: Report) -> str:
    """What the card says of quality "max" where that has rounded layers to nearest; else nothing."""
    quantized = [layer for layer in report.layers if layer.scheme is not None]
    nearest = sorted({layer.layer for layer in quantized if layer.rounding == "nearest"})
    if report.summary.quality != MAX or not nearest:
        return ""
    is_all = all(layer.rounding == "nearest" for layer in quantized)
    which = "all layers" if is_all else f"layers {words.index_ranges(nearest)}"
    return f"; {which} rounded to nearest, which was better on held-out samples"


def _library(report: Report) -> str:
    """What loads the directory, as the Hugging Face hub calls it."""
    if "rank0.safetensors" in report.files:
        return "tensorrt_llm"
    if "release/common.pt" in report.files:
        return "megatron-lm"
    return "nemo" if "context/model.yaml" in report.files else "vllm"


def _context(report: Report) -> dict[str, Any]:
    word, fails = words.verdict(report.summary)
    return {
        "report": report,
        "summary": report.summary,
        "quality": report.quality,
        "algorithm": _label(report.summary.algorithm),
        "quantizes": report.summary.algorithm != NO_QUANT,
        "is_calibrated": _is_calibrated(report.summary.algorithm),
        "verdict": word,
        "fails": fails,
        "headline": headline(report.summary),
        "library": _library(report),
        "rounding_note": _rounding_note(report),
        "findings": grouped(report.findings),
        "schemes": schemes_of(report.layers) if _chooses(report.summary.algorithm) else [],
        "checkpoint_name": PurePosixPath(report.summary.checkpoint).name,
    }


def render_page(report: Report) -> str:
    """Writes the HTML page."""

    def bad(layer: Layer, figure: str) -> bool:
        return is_bad(report, layer, figure)

    recovery = None if report.quality is None else report.quality.recovery
    charts = {
        "recovery": make_chart(
            "recovery",
            plots.recovery_chart(report),
            ""
            if recovery is None
            else f"Recovery {recovery.value:.4f}, interval {recovery.low:.4f} to {recovery.high:.4f}",
        ),
        "errors": make_chart(
            "errors",
            plots.layer_chart(report.layers, plots.ERRORS, bad),
            "Signal to quantization noise by layer, for each kind of linear layer",
        ),
        "amaxes": make_chart(
            "amaxes",
            plots.layer_chart(report.layers, plots.AMAXES, lambda *_: False),
            "Outlier ratios and calibrated amaxes by layer, for each kind of linear layer",
        ),
        "scales": make_chart("scales", plots.scale_chart(report.layers), "Pre-quantization scales by layer"),
        "experts": make_chart("experts", plots.expert_chart(report.experts), "Calibration tokens by layer and expert"),
        "bits": make_chart("bits", plots.bits_chart(report.mixed_precision), "Predicted error over bits of a weight"),
        "steps": make_chart("steps", plots.step_chart(report.steps), "Time and peak memory of each step"),
    }
    return make_environment().get_template("report.html.j2").render(**_context(report), charts=charts)


def render_card(report: Report) -> str:
    """Writes the model card, in Markdown with Hugging Face's metadata ahead."""
    return make_environment().get_template("README.md.j2").render(**_context(report))


def render_png(report: Report) -> bytes:
    """Draws the picture of the summary."""
    return plots.summary_png(report, lambda layer, figure: is_bad(report, layer, figure))
