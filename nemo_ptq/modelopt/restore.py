# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's quantizers from a checkpoint that has them, into a Megatron model.

ModelOpt's and Megatron's own loaders unpickle the checkpoint's index and its objects, and would run what a hostile one
puts there. Files are therefore read by :mod:`nemo_ptq.checkpoint.torch_dist`, which runs nothing.
"""

import io
from functools import partial
from pathlib import Path
from typing import IO, Any

import modelopt.torch.opt as mto
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.models.gpt import GPTModel

import nemo_ptq.modelopt.attention  # noqa: F401  (ModelOpt must know it before it inserts quantizers)
from nemo_ptq.checkpoint.index import Stored, read_stored
from nemo_ptq.checkpoint.known_tensors import PREFIX
from nemo_ptq.checkpoint.torch_dist import read_box, read_chunk
from nemo_ptq.console.quiet import quiet_prints
from nemo_ptq.errors import PtqError
from nemo_ptq.modelopt.quantizers import compute_weight_amax
from nemo_ptq.quantization.state_header import IN_EXPORT, read_header
from nemo_ptq.untrusted import open_file
from nemo_ptq.untrusted_pickles import check_saved

_EXTRA_STATE = "_extra_state"


def restore_quantizers(module: GPTModel, checkpoint: Path) -> None:
    """Inserts the quantizers that a NeMo checkpoint holds, with their amaxes; does nothing where it holds none.

    Args:
        module: This rank's part of the model, its weights read.
        checkpoint: Directory with ``context/`` and ``weights/``.

    Raises:
        PtqError: If what the checkpoint holds of them is damaged, or no plain data.
    """
    weights = checkpoint / "weights"
    if not (weights / "modelopt_state").is_dir():
        return
    stored = read_stored(checkpoint)
    with quiet_prints():
        mto.restore_from_modelopt_state(module, _common_state(weights / "modelopt_state"))
        _set_extra_states(module, weights, stored)
    wanted = {
        key: value
        for key, value in module.sharded_state_dict(prefix=PREFIX).items()
        if "_quantizer." in key and not key.endswith(_EXTRA_STATE)
    }
    shards, _, factories = load_preprocess(wanted)
    state = apply_factory_merges(dict_list_map_outplace(partial(_read, weights, stored), shards), factories)
    module.load_state_dict({key.removeprefix(PREFIX): value for key, value in state.items()}, strict=False)
    _compute_weight_amaxes_again(module, checkpoint)


def _common_state(directory: Path) -> Any:
    """ModelOpt's state of the whole model."""
    file = directory / "common.pt"
    if not file.is_file():
        raise PtqError(f"{file} is missing: copy the checkpoint again, or calibrate the model that it was made from")
    with open_file(file) as opened:
        return _plain(opened, file)


def _plain(content: IO[bytes], source: object) -> Any:
    """Reads what ``torch.save`` has written, without calling anything but what torch and ModelOpt declare as safe.

    Raises:
        PtqError: If there is something else in it.
    """
    try:
        check_saved(content, content.seek(0, io.SEEK_END))
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever they like
        reason = str(error).partition("\n")[0]
        raise PtqError(
            f"{source} cannot be read as plain data ({reason}): copy or save the checkpoint again"
        ) from error


def _set_extra_states(module: GPTModel, weights: Path, stored: Stored) -> None:
    """Gives each of ModelOpt's modules what it does; what other modules keep beside their weights stays where it is."""
    modules = dict(module.named_modules())
    for key, entry in module.sharded_state_dict(prefix=PREFIX).items():
        name = key.removeprefix(PREFIX).removesuffix(_EXTRA_STATE).removesuffix(".")
        if not key.endswith(_EXTRA_STATE) or not hasattr(modules[name], "modelopt_set_extra_state_callbacks"):
            continue
        if not isinstance(entry, ShardedObject) or entry.unique_key not in stored.objects:
            raise PtqError(f"{weights} holds no quantizers of {name}: copy or save the checkpoint again")
        state = read_chunk(weights, stored.objects[entry.unique_key])[0]
        if isinstance(state, torch.Tensor):
            # ModelOpt reads the same bytes, and with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD unpickles them.
            _plain(io.BytesIO(state.numpy().tobytes()), f"{weights}: {key}")
        modules[name].set_extra_state(state)


def _read(weights: Path, stored: Stored, shard: ShardedTensor) -> torch.Tensor:
    """This rank's part of a quantizer's tensor."""
    tensor = stored.tensors.get(shard.key)
    if tensor is None or tuple(tensor.shape) != tuple(shard.global_shape):
        raise PtqError(f"{weights} holds no {shard.key} of shape {tuple(shard.global_shape)}: copy or save it again")
    sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    device = torch.device("cpu") if shard.data is None else shard.data.device
    return read_box(weights, tensor, shard.global_offset, sizes, device).reshape(shard.local_shape).to(shard.dtype)


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
