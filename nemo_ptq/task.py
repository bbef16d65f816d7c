# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The task that NeMo-Run launches, and that Python calls."""

# NeMo-Run reads these annotations to parse the command line and to serialise the task: nested configs are Annotated
# with run.Config, and there are no unions with `|`, no enumerations, no tuples and no paths.
from collections.abc import Callable
from typing import Annotated, Optional

import nemo_run as run

from nemo_ptq.config import ExportConfig, QuantizationConfig


def ptq(
    nemo_checkpoint: Optional[str] = None,
    export_config: Annotated[Optional[ExportConfig], run.Config[ExportConfig]] = None,
    calibration_tp: int = 1,
    calibration_pp: int = 1,
    calibration_ep: int = 1,
    num_layers_in_first_pipeline_stage: Optional[int] = None,
    num_layers_in_last_pipeline_stage: Optional[int] = None,
    devices: Optional[int] = None,
    num_nodes: Optional[int] = None,
    quantization_config: Annotated[Optional[QuantizationConfig], run.Config[QuantizationConfig]] = None,
    forward_loop: Optional[Callable] = None,
    tokenizer_path: Optional[str] = None,
    calibration_state: Optional[str] = None,
    legacy_ckpt: bool = False,
    trust_checkpoint: Optional[str] = None,
    tracking: Optional[str] = None,
    model_path: Optional[str] = None,
    plan_only: bool = False,
    plan_device: str = "H100",
    adapter: Optional[str] = None,
) -> str:
    r"""Quantizes a NeMo 2.0 checkpoint and exports it for inference (post-training quantization).

    The checkpoint is calibrated at the parallelism you ask for, on GPUs or on
    a CPU, and becomes a qnemo directory: a TensorRT-LLM checkpoint together
    with the tokenizer. To calibrate on two ranks and export for one GPU:

      nemo llm ptq nemo_checkpoint=CKPT calibration_tp=2 \
        quantization_config.algorithm=fp8 export_config.inference_tp=1 \
        export_config.path=OUT run.executor=torchrun

    Args:
        nemo_checkpoint: Directory of a NeMo 2.0 checkpoint, or of a Hugging Face model. Required, under this name or
            as `model_path`.
        export_config: What to write, and where. Required.
        calibration_tp: Ranks that share one layer during calibration.
        calibration_pp: Pipeline stages during calibration.
        calibration_ep: Ranks that share the experts of one layer during calibration.
        num_layers_in_first_pipeline_stage: Layers of the first stage, where stages are uneven.
        num_layers_in_last_pipeline_stage: Layers of the last stage, where stages are uneven.
        devices: Processes on each node, to be checked against the launcher's.
        num_nodes: Nodes, to be checked against the launcher's.
        quantization_config: How to quantize; None takes the defaults.
        forward_loop: Called with this rank's model, it runs it on calibration data of your own, in place of
            `quantization_config.calibration_dataset`.
        tokenizer_path: A tokenizer to use in place of the checkpoint's own.
        calibration_state: An export, or the `ptq/calibration.safetensors` of one: its calibration is used again, and
            nothing is calibrated. The checkpoint, if not given, is the one that was calibrated then.
        legacy_ckpt: Accept a checkpoint saved with another version of Transformer Engine.
        trust_checkpoint: Dotted names, with commas between, of functions and classes of your own that the checkpoint
            may have imported and called; those of NeMo's models, configs and tokenizers need no trust, and nothing
            else that it names is called. The name of a module stands for all that is in it.
        tracking: Where the run's figures go, beside its record: `mlflow:http://HOST:PORT`, `tensorboard:DIR` or
            `wandb:PROJECT`.
        model_path: Another name for `nemo_checkpoint`, as NeMo 2.3 and later call it.
        plan_only: Print what the job would need, and start nothing. `nemo-ptq plan` does the same.
        plan_device: What each rank would run on, for `plan_only`: "H100", "A100-80", "CPU" (this machine), ...
        adapter: Directory of a LoRA adapter of NeMo's or PEFT's, to be merged into the checkpoint's weights.

    Returns:
        The path of the exported directory, or of the one that would be.

    Raises:
        ConfigError: If anything about the arguments is wrong; it names all problems, and nothing has been started.
        PtqError: If the job cannot be done for another reason that the user can correct.
    """
    arguments = {**locals()}  # by name, before there is anything else that is local

    from nemo_ptq.errors import ConfigError
    from nemo_ptq.launch import front
    from nemo_ptq.launch.start import start
    from nemo_ptq.parallel.environment import read_launch

    launch = read_launch()
    try:
        job = front.check(arguments, world_size=launch.world_size, launcher=launch.launcher, speaks=launch.is_first)
    except front.Planned as planned:
        if not planned.plan.ok:
            raise ConfigError(planned.plan.problems) from None
        return str(export_config.path) if export_config else ""
    start(job)
    return str(job.output)
