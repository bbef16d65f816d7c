# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter as Hugging Face's PEFT saves it: adapter_config.json and adapter_model.safetensors."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.huggingface.description import HuggingFaceDescription
from nemo_ptq.checkpoint.huggingface.hf_files import found_in
from nemo_ptq.checkpoint.huggingface.stored_tensors import StoredTensor, planned_parts, tensors_in
from nemo_ptq.checkpoint.known_tensors import DTYPES
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_json_object

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
_COPY = re.compile(r"base_model\.model\.(?P<module>(?!.*\.lora_).+?)(\.base_layer)?\.weight")
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules")
# Settings whose effect the saved matrices already have, and settings for training.
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config"),
    *("eva_config", "qalora_group_size"),
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Others change the model's own weights as training starts, so that the saved matrices belong to other ones.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_WITH_PEFT = "merge it with PEFT (merge_and_unload), and give the merged model"
_SHOWN = 60


Named = tuple[str, StoredTensor]
"""A tensor, and its name in its file."""


@dataclass(frozen=True)
class PeftAdapter:
    """PEFT's LoRA of a Hugging Face model.

    Attributes:
        path: Its directory.
        scale: Factor of the product of two matrices.
        rank: Rows of the first matrix, and columns of the second.
        targets: The modules that config says are changed, by the ends of their names; None where it has a pattern, or
            leaves some of them out.
        matrices: (rank, in) and (out, rank), by the name of the weight that they change.
        copies: Whole weights of the embedding and the output layer, by their names in the model. PEFT saves them where
            they may have changed, and uses them in place of the model's.
    """

    path: Path
    scale: float
    rank: int
    targets: tuple[str, ...] | None
    matrices: Mapping[str, tuple[Named, Named]]
    copies: Mapping[str, Named]

    def check(self, base: HuggingFaceDescription) -> None:
        """Compares it with the model that it is to be merged into.

        Raises:
            PtqError: If it is of another model, or is not whole.
        """
        weights = {
            name: base.tensors[name].shape
            for part in planned_parts(base.hf_class, base.settings, base.spec)
            for name in part.names
            if len(base.tensors[name].shape) == 2
        }
        if others := sorted(self.matrices.keys() - weights.keys()):
            raise PtqError(
                f"the adapter {self.path} changes {others[0]}, which is no weight of a linear layer of this model: "
                "give the model that it was trained on"
            )
        for name, ((_, first), (_, second)) in self.matrices.items():
            out, inputs = weights[name]
            if (first.shape, second.shape) != ((self.rank, inputs), (out, self.rank)):
                raise PtqError(
                    f"the adapter {self.path} has matrices {first.shape} and {second.shape} of {name}, and r "
                    f"{self.rank}; this model takes {(self.rank, inputs)} and {(out, self.rank)}: give the model that "
                    "it was trained on"
                )
        for name, (_, copy) in self.copies.items():
            if name not in (base.hf_class.embedding, f"{base.hf_class.output_layer}.weight"):
                raise PtqError(
                    f"the adapter {self.path} holds {name}, a whole weight, and only LoRA's matrices can be merged: "
                    f"{_WITH_PEFT}"
                )
            if name in base.tensors and copy.shape != base.tensors[name].shape:
                raise PtqError(
                    f"the adapter {self.path} has {name} of shape {copy.shape}, and the model of "
                    f"{base.tensors[name].shape}, so tokens were added: {_WITH_PEFT}"
                )
        if missing := sorted(self._targeted(weights) - self.matrices.keys()):
            raise PtqError(
                f"the adapter {self.path} lacks {len(missing)} of the weights that target_modules in {CONFIG} names, "
                f"{missing[0]} among them: copy or save it again"
            )

    def _targeted(self, weights: Collection[str]) -> set[str]:
        ends = tuple(f".{target}.weight" for target in self.targets or ())
        return {name for name in weights if ends and f".{name}".endswith(ends)}


def is_peft(path: Path) -> bool:
    """Whether a directory is an adapter of PEFT's."""
    return (path / CONFIG).is_file()


def base_of(path: Path) -> str | None:
    """The name or path of the model that the adapter was trained on, as it was then."""
    return str(read_json_object(path / CONFIG).get("base_model_name_or_path") or "") or None


def read_peft_adapter(path: Path) -> PeftAdapter:
    """Reads an adapter's description, and none of its matrices.

    Raises:
        PtqError: If it is not a LoRA, has settings that are not known, or is damaged.
    """
    file = path / CONFIG
    config = read_json_object(file)
    _check_config(file, config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    if not is_rank or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise PtqError(f"{file} has r {rank!r} and lora_alpha {alpha!r}: they must be numbers above zero")
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise PtqError(f"the adapter {path} lacks {_WEIGHTS[0]}; {found_in(path)}: copy or save it again")
    assert isinstance(rank, int)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    targets, is_partial = (
        config.get("target_modules"),
        config.get("layers_to_transform") or config.get("exclude_modules"),
    )
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    listed = tuple(targets or ()) if is_list and not is_partial else None
    matrices, copies = _tensors(path, weights)
    return PeftAdapter(path, scale, rank, listed, matrices, copies)


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise PtqError(
            f"{file} has peft_type {str(config.get('peft_type'))[:_SHOWN]!r}, and only LORA can be merged here: "
            f"{_WITH_PEFT}"
        )
    refused = [
        f"{name} {repr(value)[:_SHOWN]}"
        for name, value in sorted(config.items())
        if name not in _READ and name not in _HARMLESS and value not in _NEUTRAL.get(name, _NOTHING)
    ]
    if refused:
        raise PtqError(
            f"{file} has {', '.join(refused)}, which asks for more than the product of two matrices, or is not known: "
            f"{_WITH_PEFT}"
        )


def _tensors(path: Path, weights: Path) -> tuple[dict[str, tuple[Named, Named]], dict[str, Named]]:
    """The matrices, and the copies of whole weights."""
    found: dict[str, dict[str, Named]] = {}
    copies: dict[str, Named] = {}
    for name, tensor in tensors_in(weights).items():
        matrix, copy = _MATRIX.fullmatch(name), _COPY.fullmatch(name)
        if not (matrix or copy) or tensor.dtype not in DTYPES or len(tensor.shape) != 2:
            raise PtqError(
                f"{weights} holds {name}, {tensor.dtype} of shape {tensor.shape}: only LoRA's matrices of linear "
                f"layers, in {', '.join(DTYPES)}, can be merged"
            )
        if matrix:
            found.setdefault(f"{matrix['module']}.weight", {})[matrix["which"]] = (name, tensor)
        elif copy:
            copies[f"{copy['module']}.weight"] = (name, tensor)
    if not found:
        raise PtqError(f"{weights} holds no adapters: copy or save it again")
    if single := sorted(name for name, pair in found.items() if len(pair) < 2):
        raise PtqError(f"the adapter {path} has only one matrix of {single[0]}: copy or save it again")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}, copies
