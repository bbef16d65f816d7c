# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq evaluate`: what quantization costs, from the exported files alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nemo_ptq.errors import PtqError


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Exported directory.")],
    baseline: Annotated[
        Path, typer.Option(help="What to compare with: the checkpoint, or an export of it with no_quant.")
    ],
    text: Annotated[Path, typer.Option(help="Documents: a .jsonl, .json or .txt file.")],
    seq_len: Annotated[int, typer.Option(help="Tokens at which a document is cut.")] = 2048,
    documents: Annotated[int, typer.Option(help="How many documents to read.")] = 128,
    min_recovery: Annotated[
        float, typer.Option(help="Fail if baseline perplexity / perplexity is less than this.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run an exported directory on text, from its files alone, and compare it with the unquantized model."""
    from nemo_ptq.checkpoint.metadata import is_hugging_face
    from nemo_ptq.quiet import quiet_imports, quiet_libraries
    from nemo_ptq.verify.documents import load_documents
    from nemo_ptq.verify.evaluate import compare, summarize
    from nemo_ptq.verify.forward import stream_logits

    tokens = load_documents(directory, text, seq_len, documents)
    if (baseline / "context").is_dir() or is_hugging_face(baseline):
        with quiet_imports():
            from nemo_ptq.evaluation import checkpoint_logits
        quiet_libraries()
        truth = checkpoint_logits(baseline, tokens)
    else:
        truth = stream_logits(baseline, tokens)
    result = summarize(compare(truth, stream_logits(directory, tokens), tokens))
    recovery = result.baseline_perplexity.value / result.perplexity.value
    if as_json:
        typer.echo(json.dumps({**asdict(result), "recovery": recovery}, indent=2))
    else:
        figures = {
            "perplexity": result.perplexity,
            "perplexity of the baseline": result.baseline_perplexity,
            "KL divergence (nats per token)": result.kl_divergence,
            "top-1 agreement": result.top1_agreement,
        }
        for name, interval in figures.items():
            typer.echo(f"{name:32}{interval.value:10.4f}   95 % interval {interval.low:.4f} to {interval.high:.4f}")
        typer.echo(f"{'recovery':32}{recovery:10.4f}   over {len(tokens)} documents")
    if recovery < min_recovery:
        raise PtqError(f"recovery {recovery:.4f} is less than --min-recovery {min_recovery}")
