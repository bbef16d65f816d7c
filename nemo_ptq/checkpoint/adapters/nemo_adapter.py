# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A LoRA checkpoint of NeMo's: ``context/`` names the rank and alpha, ``weights/`` has two matrices for each layer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_ptq.checkpoint.context_graph import read_transform
from nemo_ptq.checkpoint.index import StoredTensor, read_index, read_stored, weights_of
from nemo_ptq.checkpoint.known_tensors import DTYPES, PREFIX, is_weight
from nemo_ptq.checkpoint.shards import check_shards
from nemo_ptq.errors import PtqError
from nemo_ptq.models.mapping import is_linear, live_name
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.untrusted import read_json_object

LORA = "nemo.collections.llm.peft.lora.LoRA"
ADAPTER_FILE = "weights/adapter_metadata.json"
"""Tells a checkpoint of adapters alone, and names the model that they were trained on."""
# Defaults of NeMo's class, for values that the context lacks.
_DEFAULT = 32
_MATRIX = re.compile(r"(?P<linear>.+)\.adapter\.linear_(?P<which>in|out)\.weight(?P<rows>_[wv])?")


@dataclass(frozen=True)
class NemoAdapter:
    """NeMo's LoRA of a model.

    Attributes:
        path: Its directory.
        scale: Factor of the product of two matrices: alpha / rank.
        rank: Rows of the first matrix, and columns of the second.
        linears: The first matrix of each linear layer that it changes, (rank, in), and the second, (out, rank), which
            is two where the halves of a gated layer are apart; by the layer's name in checkpoints. Layers that are
            alike are stacked.
    """

    path: Path
    scale: float
    rank: int
    linears: Mapping[str, tuple[StoredTensor, tuple[StoredTensor, ...]]]

    @property
    def weights(self) -> Path:
        """Where its files are."""
        return weights_of(self.path)

    def check(self, model: ModelSpec) -> None:
        """Compares it with the model that it is to be merged into.

        Raises:
            PtqError: If it is of another model, or cannot be merged.
        """
        for linear, (first, groups) in self.linears.items():
            self._check_linear(linear, first, groups, model)

    def _check_linear(
        self, linear: str, first: StoredTensor, groups: tuple[StoredTensor, ...], model: ModelSpec
    ) -> None:
        name = live_name(f"{linear}.weight", 0, 0).removesuffix(".weight")
        if not is_linear(name) or not _has(model, name):
            raise PtqError(
                f"the adapter {self.path} changes {linear}, and the model has no such linear layer: {_OTHER}"
            )
        out, inputs = model.module(name).shape
        found = [first.shape[-2:], (sum(group.shape[-2] for group in groups), groups[0].shape[-1])]
        expected, stacks = [(self.rank, inputs), (out, self.rank)], _stacks(linear, model)
        if found != expected or any(tensor.shape[:-2] not in stacks for tensor in (first, *groups)):
            shapes = " and ".join(str(tensor.shape) for tensor in (first, *groups))
            raise PtqError(
                f"the adapter {self.path} has matrices {shapes} of {linear}, and rank {self.rank}; this model of "
                f"{model.num_layers} layers takes {expected[0]} and {expected[1]} in each: {_OTHER}"
            )
        cuts = len({chunk.offsets[-2] for chunk in groups[0].chunks})
        if not model.gated_mlp and linear.endswith("linear_fc1") and cuts > 2:
            raise PtqError(
                f"the adapter {self.path} was saved at tensor parallelism {cuts // 2}, where NeMo mixes up the rows of "
                f"{linear} of a model without a gate: save it at tensor parallelism 1"
            )


_OTHER = "give the model that it was trained on"


def _stacks(linear: str, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Axes that may precede the two axes of a matrix: stacked layers and experts."""
    if not re.match(r"decoder\.layers\.\D", linear):
        return ((),)
    layers = (model.num_layers,)
    if ".experts.experts." not in linear or model.num_experts is None:
        return (layers,)
    return (layers, (*layers, model.num_experts))  # one matrix of all experts, or one of each


def _has(model: ModelSpec, name: str) -> bool:
    try:
        return model.has(name) and name.startswith("decoder.layers.")
    except (IndexError, ValueError):  # no such layer
        return False


def is_nemo_adapter(path: Path) -> bool:
    """Whether a directory is a checkpoint of NeMo's with adapters and without the model."""
    return (path / ADAPTER_FILE).is_file()


def model_of(path: Path) -> str | None:
    """The path of the model that the adapter was trained on, as it was then."""
    return str(read_json_object(path / ADAPTER_FILE).get("model_ckpt_path") or "") or None


def read_nemo_adapter(path: Path) -> NemoAdapter:
    """Reads an adapter's description, and none of its matrices.

    Raises:
        PtqError: If it is not a LoRA, holds other things besides, or is damaged.
    """
    transform = read_transform(path / "context")
    if transform is None or str(transform.function) != LORA:
        made_by = "nothing" if transform is None else transform.function
        raise PtqError(
            f"the adapter {path} was made by {made_by}, and only {LORA} can be merged: merge it with NeMo, and give "
            "the merged model"
        )
    rank, alpha = (transform.arguments.get(name, _DEFAULT) for name in ("dim", "alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise PtqError(f"the adapter {path} has dim {rank!r} and alpha {alpha!r}: they must be numbers above zero")
    check_shards(path, read_index(path).storage_data.values(), "adapter")
    tensors = {name: tensor for name, tensor in read_stored(path).tensors.items() if is_weight(name)}
    if others := sorted(name for name in tensors if not _MATRIX.fullmatch(name)):
        raise PtqError(
            f"the adapter {path} holds {len(others)} tensors that are not LoRA's, {others[0]} among them: only "
            "adapters without the model, made by NeMo's LoRA, can be merged"
        )
    if not tensors:
        raise PtqError(f"the adapter {path} holds no adapters: give the checkpoint that the fine-tuning saved")
    if wrong := sorted(name for name in tensors if tensors[name].dtype not in DTYPES or len(tensors[name].shape) < 2):
        raise PtqError(
            f"the adapter {path} has {wrong[0]} as {tensors[wrong[0]].dtype} of shape {tensors[wrong[0]].shape}: "
            f"matrices in {', '.join(DTYPES)} can be merged"
        )
    by_name = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    linears = sorted({match["linear"] for name in by_name if (match := _MATRIX.fullmatch(name))})
    return NemoAdapter(path, alpha / rank, rank, {linear: _matrices(path, linear, by_name) for linear in linears})


def _matrices(
    path: Path, linear: str, tensors: Mapping[str, StoredTensor]
) -> tuple[StoredTensor, tuple[StoredTensor, ...]]:
    first = tensors.get(f"{linear}.adapter.linear_in.weight")
    names = (f"{linear}.adapter.linear_out.weight{rows}" for rows in ("", "_w", "_v"))
    groups = tuple(tensors[name] for name in names if name in tensors)
    if first is None or not groups:
        raise PtqError(f"the adapter {path} has only one matrix of {linear}: copy or save it again")
    return first, groups
