# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq export`: another export from a calibration that is there already."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_ptq.errors import ConfigError
from nemo_ptq.launch.flags import Flag, in_flags

# What a problem calls by an option's name is a flag, or has another place, on this command line.
_FLAGS = (
    Flag("calibration_state", ("STATE_OR_DIR",)),
    Flag("nemo_checkpoint", ("--checkpoint",)),
    Flag("adapter", ("--adapter",)),
    Flag("tokenizer_path", ("--tokenizer",)),
    Flag("trust_checkpoint", ("--trust-checkpoint",)),
    Flag("export_config.path", ("OUT",)),
    Flag("export_config.export_format", ("--format",)),
    Flag("export_config.dtype", ("--dtype",)),
    Flag("export_config.decoder_type", ("--decoder-type",)),
    Flag("export_config.inference_tp", ("--inference-tp",)),
    Flag("export_config.inference_pp", ("--inference-pp",)),
    Flag("export_config.overwrite", ("--overwrite",), True),
)


def export(
    state: Annotated[
        Path, typer.Argument(metavar="STATE_OR_DIR", help="A calibration state, or an export that holds one.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    checkpoint: Annotated[
        Optional[Path], typer.Option(help="The checkpoint that was calibrated, if it is no longer where it was.")
    ] = None,
    export_format: Annotated[str, typer.Option("--format", help="Format of the export, or several: a,b.")] = "trtllm",
    dtype: Annotated[str, typer.Option(help="Data type of what stays unquantized: bf16 or fp16.")] = "bf16",
    inference_tp: Annotated[int, typer.Option(help="Tensor parallelism of the exported model.")] = 1,
    inference_pp: Annotated[int, typer.Option(help="Pipeline parallelism of the exported model.")] = 1,
    decoder_type: Annotated[Optional[str], typer.Option(help="Decoder type, for a model class of your own.")] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="Tokenizer in place of the checkpoint's.")] = None,
    adapter: Annotated[
        Optional[Path], typer.Option(help="The LoRA adapter that was merged, if it is no longer where it was.")
    ] = None,
    trust_checkpoint: Annotated[
        Optional[str],
        typer.Option(help="Your own code that the checkpoint may call in addition to NeMo's: a.b,c.d."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export at OUT.")] = False,
) -> None:
    """Write another export (format, parallelism, data type) from a saved calibration.

    One process reads the checkpoint layer by layer. Formats nemo and megatron need the whole model in memory: if that
    is too much, give calibration_state=STATE_OR_DIR to a job on several ranks.
    """
    from nemo_ptq.config import ExportConfig
    from nemo_ptq.console.quiet import transformers_without_torch
    from nemo_ptq.launch import front
    from nemo_ptq.launch.start import start
    from nemo_ptq.parallel.environment import read_launch

    config = ExportConfig(
        path=str(output),
        export_format=export_format,
        dtype=dtype,
        decoder_type=decoder_type,
        inference_tp=inference_tp,
        inference_pp=inference_pp,
        overwrite=overwrite,
    )
    arguments = {
        "nemo_checkpoint": checkpoint,
        "adapter": adapter,
        "calibration_state": state,
        "export_config": config,
        "tokenizer_path": tokenizer,
        "trust_checkpoint": trust_checkpoint,
    }
    launch = read_launch()
    try:
        job = front.check(arguments, world_size=launch.world_size)
    except ConfigError as error:
        raise ConfigError([in_flags(problem, _FLAGS) for problem in error.problems]) from error
    from nemo_ptq.engine.reexport import is_possible  # imports torch: not before the checks

    if is_possible(job, launch.world_size):
        transformers_without_torch()
    start(job)
