# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's quantizers from a checkpoint that has them, into a Megatron model."""

from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state

import nemo_ptq.modelopt.attention  # noqa: F401  (ModelOpt must know it before it inserts quantizers)
from nemo_ptq.checkpoint.known_tensors import PREFIX
from nemo_ptq.console.quiet import quiet_prints
from nemo_ptq.modelopt.quantizers import compute_weight_amax
from nemo_ptq.quantization.state_header import IN_EXPORT, read_header


def restore_quantizers(module: GPTModel, checkpoint: Path) -> None:
    """Inserts the quantizers that a NeMo checkpoint holds, with their amaxes; does nothing where it holds none.

    Args:
        module: This rank's part of the model, its weights read.
        checkpoint: Directory with ``context/`` and ``weights/``.
    """
    weights = checkpoint / "weights"
    if not (weights / "modelopt_state").is_dir():
        return
    with quiet_prints():
        restore_sharded_modelopt_state([module], weights, prefix=PREFIX)
    wanted = {
        key: value
        for key, value in module.sharded_state_dict(prefix=PREFIX).items()
        if "_quantizer." in key and not key.endswith("_extra_state")
    }
    state = dist_checkpointing.load(wanted, str(weights), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    module.load_state_dict({key.removeprefix(PREFIX): value for key, value in state.items()}, strict=False)
    _compute_weight_amaxes_again(module, checkpoint)


def _compute_weight_amaxes_again(module: GPTModel, checkpoint: Path) -> None:
    """Computes the weight amaxes of an export of ours as its calibration did.

    ModelOpt 0.47 stores those of the rows of a gated first MLP layer in the order of the tensor-parallel ranks that
    wrote them, and reads them so at any other parallelism.
    """
    state = checkpoint / IN_EXPORT
    if state.is_file():
        header = read_header(state)
        if header.is_repeatable:
            compute_weight_amax(module, header.modelopt_config)
