# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq evaluate`: what quantization costs, from the exported files alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_ptq.console.text import printable
from nemo_ptq.errors import PtqError

# Tokens of a document that the samples continue.
_PROMPT = 32


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Exported directory, in any format.")],
    baseline: Annotated[
        Optional[Path],
        typer.Option(help="What to compare with: the checkpoint, or an export of it with no_quant."),
    ] = None,
    text: Annotated[
        Optional[Path],
        typer.Option(
            help="Documents: a .jsonl, .json or .txt file. If not given, those of the calibration data set that were "
            "not calibrated on."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens at which a document is cut.")] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="How many documents to read.")] = 128,
    min_recovery: Annotated[
        Optional[float],
        typer.Option(help="Fail if baseline perplexity / perplexity is less than this; needs --baseline."),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Tokens of text to generate from each model.")] = 24,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 ...")] = "cpu",
    update_report: Annotated[
        Optional[bool],
        typer.Option(
            "--update-report/--no-update-report",
            help="Write the figures into DIR's report; done if DIR has one and is writable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run an exported directory on text, from its files alone, and compare it with the unquantized model.

    Weights, activations and KV cache are rounded as a server rounds them, layer by layer: memory needs to hold a layer
    in float32. Gives perplexity and, with --baseline, recovery, KL divergence and top-1 agreement, with 95 % intervals
    over documents.
    """
    for model_directory in (directory, baseline):
        if model_directory is not None and not model_directory.is_dir():
            raise PtqError(f"{model_directory} is not a directory: give one that was exported, or a checkpoint's")

    import torch
    from rich.console import Console

    from nemo_ptq.console.quiet import quiet_libraries
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.documents import load_documents
    from nemo_ptq.home import without_home
    from nemo_ptq.report.compose import quality_of
    from nemo_ptq.report.update import has_report, update_quality
    from nemo_ptq.verify.evaluate import continue_greedily, document_groups, require_merged_baseline, require_same_model
    from nemo_ptq.verify.evaluate import evaluate as score
    from nemo_ptq.verify.forward_pass import open_model

    if min_recovery is not None and baseline is None:
        raise PtqError("--min-recovery compares with the unquantized model: name it with --baseline")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise PtqError(f"--device {device} is not available here: {str(error).splitlines()[0]}") from error
    quiet_libraries()
    # Figures go to standard output, and what is of passing interest to the other.
    reporter = Reporter(True, Console(stderr=True, highlight=False, soft_wrap=True))
    model = open_model(directory)
    truth = None if baseline is None else open_model(baseline)
    if truth is not None and baseline is not None:
        require_same_model(model.config, truth.config)
        require_merged_baseline(directory, baseline)
    read = load_documents(directory, text, seq_len, documents)
    groups = document_groups(read.tokens, model.config.hidden_size)
    models = 1 if baseline is None else 2
    with reporter.progress("evaluate", models * len(groups) * model.config.num_hidden_layers, "layers") as progress:
        scores = score(model, truth, read.tokens, place, lambda tokens: progress.advance(1, tokens))
    samples = {}
    if sample:
        prompt = read.tokens[0][0, : min(_PROMPT, read.tokens[0].shape[1] // 2)]
        guess = read.tokens[0][0, len(prompt) : len(prompt) + sample]
        guess = torch.cat((guess, guess.new_zeros(sample - len(guess))))
        if truth is not None:
            guess = samples["unquantized"] = continue_greedily(truth, prompt, guess, place)
        samples["quantized"] = continue_greedily(model, prompt, guess, place)
    quality = quality_of(
        scores, "evaluate", without_home(read.source), read.held_out, has_baseline=baseline is not None
    )
    words = {name: read.decode(torch.cat((prompt, tokens)).tolist()) for name, tokens in samples.items()}
    if as_json:
        typer.echo(json.dumps({**asdict(quality), "samples": words}, indent=2))
    else:
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
        for name, continued in words.items():
            typer.echo(f"\n{name}: {printable(continued)}")
    if update_report or (update_report is None and has_report(directory)):
        update_quality(directory, quality)
        reporter.say(f"the report in {directory / 'ptq'} has these figures now")
    recovery = None if quality.recovery is None else quality.recovery.value
    if min_recovery is not None and recovery is not None and recovery < min_recovery:
        raise PtqError(f"recovery {recovery:.4f} is less than --min-recovery {min_recovery}")
