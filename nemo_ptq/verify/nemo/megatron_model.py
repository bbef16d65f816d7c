# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of Megatron-LM or Megatron-Bridge as the forward pass sees it: its options under NeMo's names.

Weights have NeMo's names, except for the prefix. Options are read as data.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import open_file, read_text, read_yaml
from nemo_ptq.untrusted_pickles import load_saved
from nemo_ptq.verify.nemo.nemo_model import NemoWeights, read_model
from nemo_ptq.verify.nemo.sharded_tensors import PlainUnpickler, ShardedTensors

_PREFIX = "module."
_VOCABULARY = (f"{_PREFIX}embedding.word_embeddings.weight", f"{_PREFIX}output_layer.weight")
_MARKS = ("run_config.yaml", "common.pt", ".metadata")
_COMMON = "common_state/shard_0_1"
# Of an iteration, at most.
_DIGITS = 20
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
    """Whether a directory is such a checkpoint, or one iteration of one; whole or not."""
    marks = any((path / name).is_file() for name in (*_MARKS, _TRACKER))
    return not (path / "context").is_dir() and (marks or any(path.glob("iter_*/")))


def iteration_of(path: Path) -> Path:
    """The iteration that a directory means: itself, the one that its tracker names, or the last one.

    Raises:
        PtqError: If there is none.
    """
    if any((path / name).is_file() for name in _MARKS):
        return path
    if (path / _TRACKER).is_file():
        text = read_text(path / _TRACKER).strip()
        name = f"iter_{int(text):07}" if text.isdecimal() and len(text) < _DIGITS else "release"
        found = [path / name] if text == name or text.isdecimal() else []
    else:
        found = sorted(path.glob("iter_*/"))
    if not found or not found[-1].is_dir():
        raise PtqError(f"{path} is no checkpoint of Megatron-LM: the iteration that it names is not there")
    return found[-1]


def read_options(iteration: Path) -> dict[str, Any]:
    """Reads what describes the model, under NeMo's names.

    Raises:
        PtqError: If nothing does.
    """
    is_bridge = (iteration / _MARKS[0]).is_file()
    options = _of_bridge(iteration / _MARKS[0]) if is_bridge else _of_arguments(iteration)
    if options.get("rope_scaling"):
        options |= {"scale_factor": options.get("rope_scaling_factor", 8.0), **_LLAMA_31}
    return options


def read_tensors(iteration: Path, options: Mapping[str, Any]) -> ShardedTensors:
    """Opens the weights under NeMo's names, without the rows that the vocabulary was padded with.

    Args:
        iteration: From :func:`iteration_of`.
        options: From :func:`read_options`.
    """
    is_padded = (iteration / _MARKS[0]).is_file() and options.get("should_pad_vocab")
    return _MegatronTensors(iteration, options.get("vocab_size") if is_padded else None)


def tokenizer_of(path: Path) -> Path | None:
    """Directory of a checkpoint's tokenizer; None if it has none, like those of Megatron-LM itself."""
    found = iteration_of(path) / "tokenizer"
    return found if found.is_dir() else None


def open_megatron(path: Path) -> NemoWeights:
    """Opens a checkpoint; only its description and the index of its weights are read.

    Raises:
        PtqError: If it does not describe a model that can be run.
    """
    iteration = iteration_of(path)
    options = read_options(iteration)
    description = {"_target_": options.get("_target_", ""), "config": options}
    return read_model(iteration, description, read_tensors(iteration, options))


def _of_bridge(file: Path) -> dict[str, Any]:
    content = read_yaml(file)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("activation_func"), dict):
        raise PtqError(f"{file} describes no model")
    function = str(model["activation_func"].get("_target_")).rpartition(".")[2]
    return {**model, "activation_func": {"_target_": _ACTIVATIONS.get(function, function)}}


def _of_arguments(iteration: Path) -> dict[str, Any]:
    arguments = _read_arguments(iteration)
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


def _read_arguments(iteration: Path) -> Mapping[str, Any]:
    """Reads Megatron-LM's arguments, from common.pt or, from Megatron-Core 0.19 on, an object among the weights."""
    file = iteration / _MARKS[1]
    try:
        if file.is_file():
            with open_file(file) as opened:
                common = load_saved(opened, PlainUnpickler)
        else:
            content = ShardedTensors(iteration, iteration).stored_bytes(_COMMON)
            (common,) = load_saved(io.BytesIO(content), PlainUnpickler)
        return vars(common["args"])
    except PtqError:
        raise
    except (BadZipFile, KeyError, TypeError, ValueError) as error:
        raise PtqError(f"{iteration} holds no arguments of Megatron-LM") from error
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise PtqError(f"the arguments in {iteration} cannot be read: {error!r}"[:200]) from error
