# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Megatron model as a row of blocks (embedding, each layer, head) whose weights are read and dropped one by one.

The model is built without memory for its weights, on torch's meta device. Loading a block allocates its parameters on
the device of the job and reads this rank's shards of them from the checkpoint.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.errors import PtqError
from nemo_ptq.models.state_space import STATE_PARAMETERS
from nemo_ptq.parallel.ranks import Parallelism

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*local_experts\.)(\d+)(.*)")
# Bytes that are sent to a GPU at a time.
_SENT_AT_ONCE = 1 << 26
_TIED = {"output_layer.weight": "embedding.word_embeddings.weight"}
# The tensors whose rows a tensor parallelism may pad.
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Block:
    """A part of the model whose weights are in memory together.

    Attributes:
        index: Place in the whole model: 0 is the embedding, ``i + 1`` is layer ``i``, the last one is the head.
        place: A layer's place in this pipeline stage.
        modules: This rank's modules by Megatron's names, layers and experts counted through the whole model. Modules
            without parameters are among them.
    """

    index: int
    place: int
    modules: Mapping[str, torch.nn.Module]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Module, str]]:
        """Yields each parameter's name in the whole model, the module that owns it and its name there."""
        for name, module in self.modules.items():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter is not None:
                    yield f"{name}.{own}", module, own


def split_into_blocks(module: Any, num_layers: int) -> list[Block]:
    """Splits this rank's pipeline stage into blocks, in their order.

    Args:
        module: Megatron's GPTModel.
        num_layers: Number of layers of the whole model.
    """
    blocks: dict[int, dict[str, torch.nn.Module]] = {}
    first = module.decoder.layers[0].layer_number if len(module.decoder.layers) else 1
    for name, child in _named_globally(module):
        if name.startswith("embedding."):
            index = 0
        elif match := _LAYER.fullmatch(name):
            index = int(match[1]) + 1
        elif name.startswith(("decoder.final_layernorm", "output_layer")):
            index = num_layers + 1
        else:
            continue
        blocks.setdefault(index, {})[name] = child
    return [Block(index, index - first, blocks[index]) for index in sorted(blocks)]


def _named_globally(module: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields all modules, with layers and experts counted through the whole model."""
    first_expert = 0
    for name, child in module.named_modules():
        if hasattr(child, "local_expert_indices"):
            first_expert = child.local_expert_indices[0]
        if match := _LAYER.fullmatch(name):
            layer = module.decoder.layers[int(match[1])]
            name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
        if match := _EXPERT.fullmatch(name):
            name = f"{match[1]}{int(match[2]) + first_expert}{match[3]}"
        yield name, child


class BlockLoader:
    """Reads the weights of blocks from a checkpoint.

    Args:
        parts: Every part of every tensor of the checkpoint.
        device: Where weights go.
        dtype: Data type that they take.
        parallelism: This rank's place, which says what its shards are.
        gated: Whether the first layer of an MLP holds a gate and an up projection, each of which is cut by itself.
        row_groups: Sizes of the groups of rows of further modules that are cut one by one, by the end of the name.
    """

    def __init__(
        self,
        parts: Sequence[TensorPart],
        device: torch.device,
        dtype: torch.dtype,
        parallelism: Parallelism,
        gated: bool,
        row_groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._parts = {part.live_name: part for part in parts}
        self._device, self._dtype, self._parallelism, self._gated = device, dtype, parallelism, gated
        self._reader = ThreadPoolExecutor(1)
        self._ahead: Future[None] | None = None
        self._row_groups = row_groups or {}

    def load(self, block: Block) -> None:
        """Allocates the parameters of a block and reads them; those that have memory already are left alone.

        Raises:
            PtqError: If the checkpoint lacks one of them, or holds it in another shape.
        """
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.result()
        self._load(block)

    def load_ahead(self, block: Block) -> None:
        """Begins to read a block while another is at work on a GPU; :meth:`load` waits for it, and raises its errors.

        On a CPU, which has nothing to spare, nothing is begun.
        """
        if self._device.type == "cuda":
            self._ahead = self._reader.submit(self._load_beside, block)

    def _load_beside(self, block: Block) -> None:
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            self._load(block)
        stream.synchronize()

    def _load(self, block: Block) -> None:
        for name, module, own in block.parameters():
            parameter = module.get_parameter(own)
            if not parameter.is_meta:
                continue
            dtype = torch.float32 if own in STATE_PARAMETERS else self._dtype
            values = torch.empty(parameter.shape, dtype=dtype, device=self._device)
            self._read(name, values)
            module.register_parameter(own, torch.nn.Parameter(values, requires_grad=False))

    def drop(self, block: Block) -> None:
        """Frees the parameters of a block."""
        for _, module, own in block.parameters():
            empty = module.get_parameter(own).to("meta")
            module.register_parameter(own, torch.nn.Parameter(empty, requires_grad=False))

    def _read(self, name: str, values: torch.Tensor) -> None:
        part = self._parts.get(name) or self._parts.get(_TIED.get(name, ""))
        if part is None:
            raise PtqError(f"the checkpoint has no {name}, which the model needs: save or copy the checkpoint again")
        ranks = self._parallelism.sharing(name)
        whole = part.read()
        sources, targets = self._cut_one_by_one(name, whole), self._cut_one_by_one(name, values)
        if len(sources) != len(targets):
            shapes = f"{tuple(whole.shape)} in the checkpoint, a shard of it {tuple(values.shape)} in the model"
            raise PtqError(f"{name} has shape {shapes}: the context is of another model than the weights")
        for source, target in zip(sources, targets, strict=True):
            _copy_shard(name, source, target, ranks.rank, ranks.size)

    def _cut_one_by_one(self, name: str, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Splits a parameter, or a shard of one, into the groups of rows that are sharded one by one."""
        if self._gated and ".linear_fc1." in name:
            return rows.chunk(2)
        for module, sizes in self._row_groups.items():
            own = [size * len(rows) // sum(sizes) for size in sizes]
            if f".{module}." in name and sum(own) == len(rows):
                return rows.split(own)
        return (rows,)


def _copy_shard(name: str, source: torch.Tensor, target: torch.Tensor, rank: int, ranks: int) -> None:
    """Copies this rank's share of a whole tensor; rows that only this parallelism pads become zero."""
    cut = [axis for axis, (size, local) in enumerate(zip(source.shape, target.shape, strict=True)) if size != local]
    if not cut:
        _copy_through_page_locked(target, source)
        return
    axis = cut[0]
    size, local = source.shape[axis], target.shape[axis]
    start = min(rank * local, size)
    stop = min(start + local, size)
    fits = local * ranks >= size if name in _VOCABULARY else local * ranks == size
    if len(cut) > 1 or not fits:
        shapes = f"{tuple(source.shape)} in the checkpoint, a shard of it {tuple(target.shape)} in the model"
        raise PtqError(f"{name} has shape {shapes}: the context is of another model than the weights")
    if stop - start < local:
        target.zero_()
    target.narrow(axis, 0, stop - start).copy_(source.narrow(axis, start, stop - start))


def _copy_through_page_locked(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies a tensor; onto a GPU through page-locked memory, part of it being read while another is sent.

    Args:
        target: Contiguous, on any device.
        source: A tensor of the same shape, on the CPU.
    """
    if not target.is_cuda or not source.is_contiguous() or source.nbytes < _SENT_AT_ONCE:
        target.copy_(source)
        return
    count = _SENT_AT_ONCE // source.itemsize
    pages = [torch.empty(count, dtype=source.dtype, pin_memory=True) for _ in range(2)]
    sent = [torch.cuda.Event() for _ in pages]
    pieces = zip(target.view(-1).split(count), source.view(-1).split(count), strict=True)
    for place, (there, here) in enumerate(pieces):
        turn = place % len(pages)
        sent[turn].synchronize()
        there.copy_(pages[turn][: len(here)].copy_(here), non_blocking=True)
        sent[turn].record()


def parameters_of(blocks: Sequence[Block]) -> Callable[[str], torch.Tensor | None]:
    """Returns a function that finds a parameter of some blocks by Megatron's name in the whole model.

    The function returns the parameter as it is when called; None where no parameter has the name.
    """
    owners = {name: (module, own) for block in blocks for name, module, own in block.parameters()}

    def read(name: str) -> torch.Tensor | None:
        module, own = owners.get(name, (None, ""))
        return None if module is None else module.get_parameter(own)

    return read
