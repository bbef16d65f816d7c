# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq convert`: any checkpoint becomes any other, unquantized."""

import os
from pathlib import Path
from typing import Annotated, Optional

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Checkpoint of NeMo 2.0, Hugging Face, Megatron-LM or Megatron-Bridge."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    to: Annotated[str, typer.Option("--format", help="What to make: hf, nemo or megatron.")],
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="Hugging Face directory of the tokenizer, in place of the checkpoint's.")
    ] = None,
    adapter: Annotated[
        Optional[Path], typer.Option(help="LoRA adapter of NeMo's or PEFT's, merged into the weights.")
    ] = None,
) -> None:
    """Convert a checkpoint to another kind, unquantized, and compare each tensor with the one it was made from."""
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.convert import convert as run

    # A home directory that does not exist stays as it is written, and is not found.
    read, written = (Path(os.path.abspath(os.path.expanduser(path))) for path in (source, output))
    lora = None if adapter is None else Path(os.path.abspath(os.path.expanduser(adapter)))
    run(read, written, to, tokenizer, Reporter(True), lora)
