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
    legacy_ckpt: bool = False,
    model_path: Optional[str] = None,
) -> str:
    r"""Quantizes a NeMo 2.0 checkpoint and exports it for inference (post-training quantization).

    The checkpoint is calibrated at the parallelism you ask for, on GPUs or on a CPU, and becomes a qnemo directory: a
    TensorRT-LLM checkpoint together with the tokenizer.

    Calibrate on two ranks, export for one GPU:

        nemo llm ptq nemo_checkpoint=CKPT calibration_tp=2 quantization_config.algorithm=fp8 \
            export_config.inference_tp=1 export_config.path=OUT \
            run.executor=torchrun run.executor.ntasks_per_node=2

    Arguments (required: nemo_checkpoint, export_config.path):

        nemo_checkpoint                           the checkpoint's directory (model_path means the same)
        calibration_tp, _pp, _ep                  tensor, pipeline and expert parallelism of the calibration (1)
        num_layers_in_first_pipeline_stage        layers of the first stage, where stages are uneven
        num_layers_in_last_pipeline_stage         layers of the last stage, where stages are uneven
        devices, num_nodes                        processes on a node, and nodes; checked against the launcher's
        tokenizer_path                            a tokenizer to use in place of the checkpoint's
        legacy_ckpt                               accept a checkpoint of another Transformer Engine (false)
        quantization_config.algorithm             fp8, int8_sq, int4_awq, w4a8_awq, nvfp4, no_quant, or a JSON or
                                                  YAML file with a ModelOpt config (fp8)
        quantization_config.awq_block_size        input features that share a scale in AWQ (128)
        quantization_config.sq_alpha              SmoothQuant's migration strength, 0 to 1 (0.5)
        quantization_config.enable_kv_cache       quantize the KV cache (on for fp8, except on decoder gpt)
        quantization_config.kv_cache_qformat      format of a quantized KV cache (fp8)
        quantization_config.calibration_dataset   cnn_dailymail, wikitext, or a .jsonl, .json or .txt file
                                                  (cnn_dailymail)
        quantization_config.calibration_dataset_size   samples to calibrate on (512)
        quantization_config.calibration_batch_size     samples in a batch (64)
        quantization_config.calibration_seq_len        tokens at which a sample is cut (128)
        export_config.path                        the directory to make
        export_config.export_format               trtllm
        export_config.dtype                       what stays unquantized: bf16 or fp16 (bf16)
        export_config.decoder_type                llama, gpt or gemma (from the model)
        export_config.inference_tp, inference_pp  parallelism of the exported model (1)
        export_config.generate_sample             show a few generated tokens after calibration (false)
        export_config.overwrite                   replace an existing export_config.path (false)

    Args:
        nemo_checkpoint: Directory of the checkpoint. Required, under this name or as `model_path`.
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
        legacy_ckpt: Accept a checkpoint saved with another version of Transformer Engine.
        model_path: Another name for `nemo_checkpoint`, as NeMo 2.3 and later call it.

    Returns:
        The path of the exported directory.

    Raises:
        ConfigError: If anything about the arguments is wrong; it names all problems, and nothing has been started.
        PtqError: If the job cannot be done for another reason that the user can mend.
    """
    from nemo_ptq.launch import read_launch
    from nemo_ptq.preflight import check_job
    from nemo_ptq.quiet import quiet_imports

    job = check_job(
        nemo_checkpoint=nemo_checkpoint,
        export_config=export_config,
        calibration_tp=calibration_tp,
        calibration_pp=calibration_pp,
        calibration_ep=calibration_ep,
        num_layers_in_first_pipeline_stage=num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=num_layers_in_last_pipeline_stage,
        devices=devices,
        num_nodes=num_nodes,
        quantization_config=quantization_config,
        forward_loop=forward_loop,
        tokenizer_path=tokenizer_path,
        legacy_ckpt=legacy_ckpt,
        model_path=model_path,
        world_size=read_launch().world_size,
    )

    # Imports torch, Megatron and NeMo: only a job that can run waits for them.
    with quiet_imports():
        from nemo_ptq.engine import run_job

    run_job(job)
    return str(job.output)
