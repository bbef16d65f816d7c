# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq evaluate`: what quantization costs, from the exported files alone."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from nemo_ptq.console.text import printable
from nemo_ptq.errors import PtqError

if TYPE_CHECKING:
    import torch

    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.documents import Documents
    from nemo_ptq.report.records import Quality, Report
    from nemo_ptq.verify.weights import Weights

# Tokens at the beginning of the first document that the models continue.
_PROMPT = 32


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Exported directory, in any format.")],
    baseline: Annotated[
        Optional[Path],
        typer.Option(help="The unquantized model to compare with: the checkpoint, or an export of it with no_quant."),
    ] = None,
    text: Annotated[
        Optional[Path],
        typer.Option(
            help="Documents: a .jsonl, .json, .txt or .parquet file. If not given, the samples of the calibration data "
            "set that the job did not calibrate on."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens after which a document is cut.")] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="How many documents to read.")] = 128,
    min_recovery: Annotated[
        Optional[float],
        typer.Option(help="Fail if baseline perplexity / perplexity is less than this; needs --baseline."),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Tokens of text to generate from each model.")] = 24,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 ...")] = "cpu",
    tasks: Annotated[
        Optional[str],
        typer.Option(
            metavar="TASK,...",
            help="Run tasks of lm-evaluation-harness instead of documents: names, or your own .yaml files. Needs the "
            "extra eval of this package.",
        ),
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(min=1, help="With --tasks: run the first documents of each task only."),
    ] = None,
    update_report: Annotated[
        Optional[bool],
        typer.Option(
            "--update-report/--no-update-report",
            help="Write the figures into DIR's report; the default if DIR has a report and is writable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run an exported directory on text, from its files alone, and compare it with the unquantized model.

    Weights, activations and KV cache are rounded as a server rounds them. Layers are run one at a time, so memory holds
    one layer in float32. Prints perplexity and, with --baseline, recovery, KL divergence and top-1 agreement, with 95 %
    intervals over documents. With --tasks, prints the figures of lm-evaluation-harness's tasks.
    """
    for model_directory in (directory, baseline):
        if model_directory is not None and not model_directory.is_dir():
            raise PtqError(f"{model_directory} is not a directory: give one that was exported, or a checkpoint's")
    if min_recovery is not None and baseline is None:
        raise PtqError("--min-recovery compares with the unquantized model: name it with --baseline")
    if min_recovery is not None and not math.isfinite(min_recovery):
        raise PtqError(f"--min-recovery {min_recovery} is not a finite number: 1 is lossless, and 0.99 usual for fp8")
    for option, value in {"--text": text, "--min-recovery": min_recovery}.items():
        if tasks is not None and value is not None:
            raise PtqError(f"--tasks cannot be combined with {option}: run nemo-ptq evaluate once with each")
    if limit is not None and tasks is None:
        raise PtqError("--limit says how many documents of a task are run: name tasks with --tasks, or use --documents")

    from rich.console import Console

    from nemo_ptq.console.quiet import quiet_libraries
    from nemo_ptq.console.reporter import Reporter

    place = _device(device)
    quiet_libraries()
    # Figures go to standard output, and what is of passing interest to the other.
    reporter = Reporter(True, Console(stderr=True, highlight=False, soft_wrap=True, emoji=False))
    if tasks is not None:
        change = _run_tasks(directory, baseline, tasks.split(","), limit, place, reporter, as_json)
        _update(directory, update_report, change, reporter)
        return

    from nemo_ptq.report.compose import with_quality

    quality, samples = _run_documents(directory, baseline, text, seq_len, documents, sample, place, reporter)
    _print_documents(quality, samples, as_json)
    _update(directory, update_report, partial(with_quality, quality=quality), reporter)
    recovery = None if quality.recovery is None else quality.recovery.value
    if min_recovery is not None and recovery is not None and recovery < min_recovery:
        raise PtqError(f"recovery {recovery:.4f} is less than --min-recovery {min_recovery}")


def _run_documents(
    directory: Path,
    baseline: Path | None,
    text: Path | None,
    seq_len: int,
    documents: int,
    sample: int,
    device: "torch.device",
    reporter: "Reporter",
) -> "tuple[Quality, dict[str, str]]":
    """Scores documents; returns the figures, and by model the text with which it continues the first document."""
    from nemo_ptq.engine.documents import load_documents
    from nemo_ptq.home import without_home
    from nemo_ptq.report.compose import quality_of
    from nemo_ptq.verify.evaluate import document_groups, require_merged_baseline, require_same_model
    from nemo_ptq.verify.evaluate import evaluate as score
    from nemo_ptq.verify.forward_pass import open_model

    model = open_model(directory)
    truth = None
    if baseline is not None:
        truth = open_model(baseline)
        require_same_model(model.config, truth.config)
        require_merged_baseline(directory, baseline)
    read = load_documents(directory, text, seq_len, documents)
    models, groups = 1 if truth is None else 2, document_groups(read.tokens, model.config.hidden_size)
    with reporter.progress("evaluate", models * len(groups) * model.config.num_hidden_layers, "layers") as progress:
        scores = score(model, truth, read.tokens, device, lambda tokens: progress.advance(1, tokens))
    source = without_home(read.source)
    quality = quality_of(scores, "evaluate", source, read.held_out, has_baseline=truth is not None)
    return quality, _continued(model, truth, read, sample, device) if sample else {}


def _continued(
    model: "Weights", truth: "Weights | None", read: "Documents", count: int, device: "torch.device"
) -> dict[str, str]:
    """Has each model continue the beginning of the first document by ``count`` tokens; returns texts by model."""
    import torch

    from nemo_ptq.verify.evaluate import continue_greedily

    document = read.tokens[0][0]
    prompt = document[: min(_PROMPT, len(document) // 2)]
    guess = document[len(prompt) : len(prompt) + count]
    guess = torch.cat((guess, guess.new_zeros(count - len(guess))))
    continuations = {}
    if truth is not None:
        guess = continuations["unquantized"] = continue_greedily(truth, prompt, guess, device)
    continuations["quantized"] = continue_greedily(model, prompt, guess, device)
    return {name: read.decode(torch.cat((prompt, tokens)).tolist()) for name, tokens in continuations.items()}


def _print_documents(quality: "Quality", samples: dict[str, str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**asdict(quality), "samples": samples}, indent=2))
        return
    figures = {
        "perplexity": quality.perplexity,
        "perplexity of the baseline": quality.baseline_perplexity,
        "recovery": quality.recovery,
        "KL divergence (nats per token)": quality.kl_divergence,
        "top-1 agreement": quality.top1_agreement,
    }
    for name, found in figures.items():
        if found is not None:
            typer.echo(f"{name:32}{found.value:10.4f}   95 % interval {found.low:.4f} to {found.high:.4f}")
    typer.echo(f"over {quality.tokens:,} tokens of {quality.documents} documents from {printable(quality.text)}")
    for name, continued in samples.items():
        typer.echo(f"\n{name}: {printable(continued)}")


def _device(name: str) -> "torch.device":
    import torch

    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise PtqError(f"--device {name} is not available here: {str(error).splitlines()[0]}") from error
    return place


def _run_tasks(
    directory: Path,
    baseline: Path | None,
    tasks: list[str],
    limit: int | None,
    device: "torch.device",
    reporter: "Reporter",
    as_json: bool,
) -> "Callable[[Report], Report]":
    """Runs tasks and prints their figures; returns a function that adds them to a report."""
    from nemo_ptq.report.compose import with_tasks

    try:
        from nemo_ptq.engine.harness import run_tasks
    except ImportError as error:
        raise PtqError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'nemo_ptq[eval]'") from error
    figures = run_tasks(directory, baseline, tasks, limit, device, reporter)
    if as_json:
        typer.echo(json.dumps([asdict(figure) for figure in figures], indent=2))
    else:
        for figure in figures:
            line = f"{printable(figure.task)} {printable(figure.metric)}: {figure.value:.4f}"
            if figure.standard_error is not None:
                line += f" +- {figure.standard_error:.4f}"
            if figure.baseline is not None:
                line += f", unquantized {figure.baseline:.4f}"
            typer.echo(f"{line}, over {figure.documents} documents")
    return partial(with_tasks, figures=figures)


def _update(directory: Path, wanted: bool | None, change: "Callable[[Report], Report]", reporter: "Reporter") -> None:
    """Changes a directory's report if the user asks for it, or by default if there is one that can be written."""
    from nemo_ptq.report.update import has_report, update_report

    if wanted or (wanted is None and has_report(directory)):
        update_report(directory, change)
        reporter.say(f"added these figures to the report in {directory / 'ptq'}")
