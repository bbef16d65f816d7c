# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of Megatron-LM or Megatron-Bridge as the forward pass sees it: its options in the words of NeMo's.

Weights have the names that NeMo has for them, but for what those begin with. Options are read as data.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import FileError, open_file, read_text, read_yaml
from nemo_ptq.verify.nemo.nemo_model import NemoWeights, read_model
from nemo_ptq.verify.nemo.sharded_tensors import PlainUnpickler, ShardedTensors

_PREFIX = "module."
_VOCABULARY = (f"{_PREFIX}embedding.word_embeddings.weight", f"{_PREFIX}output_layer.weight")
_MARKS = ("run_config.yaml", "common.pt")
_TRACKER = "latest_checkpointed_iteration.txt"
# Megatron-LM's names of what NeMo calls otherwise.
_NAMES = {
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "use_rope_scaling": "rope_scaling",
}
_LLAMA_31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
_ACTIVATIONS = {"fast_gelu": "gelu"}


class _MegatronTensors(ShardedTensors):
    """The weights under NeMo's names, without the rows that the vocabulary was padded with."""

    def __init__(self, directory: Path, rows: int | None) -> None:
        super().__init__(directory, directory, _PREFIX)
        self._rows = rows

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = super().shape(name)
        if found is None or self._rows is None or name not in _VOCABULARY:
            return found
        return (min(self._rows, found[0]), *found[1:])

    def read(self, name: str, position: tuple[int, ...] = ()) -> torch.Tensor:
        found = super().read(name, position)
        return found[: self._rows] if name in _VOCABULARY else found


def is_megatron(path: Path) -> bool:
    """Whether a directory is such a checkpoint, or one iteration of one."""
    return not (path / "context").is_dir() and _iteration(path) is not None


def _iteration(path: Path) -> Path | None:
    """The iteration that a directory means: itself, the one that its tracker names, or the last one."""
    if any((path / name).is_file() for name in _MARKS):
        return path
    found = sorted(entry for entry in path.glob("iter_*") if entry.is_dir())
    if (path / _TRACKER).is_file():
        text = read_text(path / _TRACKER).strip()
        name = text if text == "release" else f"iter_{int(text):07}" if text.isdigit() else ""
        return path / name if name and (path / name).is_dir() else None
    return found[-1] if found else None


def open_megatron(path: Path) -> NemoWeights:
    """Opens a checkpoint; only its description and the index of its weights are read.

    Raises:
        PtqError: If it does not describe a model that can be run.
    """
    iteration = _iteration(path)
    if iteration is None:
        raise PtqError(f"{path} is no checkpoint of Megatron-LM: no iteration is there")
    is_bridge = (iteration / _MARKS[0]).is_file()
    options = _of_bridge(iteration / _MARKS[0]) if is_bridge else _of_arguments(iteration / _MARKS[1])
    if options.get("rope_scaling"):
        options |= {"scale_factor": options.get("rope_scaling_factor", 8.0), **_LLAMA_31}
    rows = options.get("vocab_size") if is_bridge and options.get("should_pad_vocab") else None
    files = _MegatronTensors(iteration, rows)
    return read_model(iteration, {"_target_": options.get("_target_", ""), "config": options}, files)


def _of_bridge(file: Path) -> dict[str, Any]:
    content = read_yaml(file)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("activation_func"), dict):
        raise PtqError(f"{file} describes no model")
    function = str(model["activation_func"].get("_target_")).rpartition(".")[2]
    return {**model, "activation_func": {"_target_": _ACTIVATIONS.get(function, function)}}


def _of_arguments(file: Path) -> dict[str, Any]:
    arguments = _read_arguments(file)
    options = {_NAMES.get(name, name): value for name, value in arguments.items() if value is not None}
    function = "silu" if options.get("swiglu") else "squared_relu" if options.get("squared_relu") else "gelu"
    positions = options.get("max_position_embeddings", options.get("seq_length"))
    return options | {
        "activation_func": {"_target_": function},
        "gated_linear_unit": bool(options.get("swiglu")),
        "num_query_groups": options.get("num_query_groups") if options.get("group_query_attention") else None,
        "seq_length": positions,
        "share_embeddings_and_output_weights": not options.get("untie_embeddings_and_output_weights", False),
    }


def _read_arguments(file: Path) -> Mapping[str, Any]:
    try:
        with open_file(file) as opened, ZipFile(opened) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            common = PlainUnpickler(io.BytesIO(archive.read(name))).load()
        return vars(common["args"])
    except FileError:
        raise
    except (BadZipFile, KeyError, TypeError, ValueError) as error:
        raise PtqError(f"{file} holds no arguments of Megatron-LM") from error
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise PtqError(f"{file} cannot be read: {error!r}"[:200]) from error
