# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The files of a layout table, streamed from the ranks that calibrated the model.

Blocks (the embedding, each layer, the head) go by one after the other. For each block a rank packs its own shards,
sends the slices that other ranks' files want, one message for each receiver, and completes the tensors of the files
it writes itself. So nobody holds more than one block of foreign tensors, and packed bytes travel, not bfloat16. Where
there is a GPU, a block is written while the next one is calibrated.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from nemo_ptq.export.layout import Block, FileTensor, Layout, Part
from nemo_ptq.export.packing import Packed
from nemo_ptq.export.reshard import Shard, Transfer, equal_shards, qkv_shards, transfers
from nemo_ptq.export.safetensors_stream import SafetensorsStream, TensorSpec
from nemo_ptq.export.shard_map import ShardMap
from nemo_ptq.models.spec import ModelSpec

# Packs one of this rank's modules, by its name in the whole model.
PackModule = Callable[[str], Packed]


def holders(part: Part, shard_map: ShardMap, shape: ModelSpec) -> list[Shard]:
    """Returns the shards of a part: one for each tensor-parallel rank, or one whole where it is not sharded."""
    owners = shard_map.owners[part.module]
    if part.axis is None:
        return [Shard(owners[0], 0, part.shape[0] if part.shape else 1)]
    if part.rows in ("q", "k", "v"):
        extent = part.shape[part.axis]
        return qkv_shards(part.rows, extent, owners, shape.num_attention_heads, shape.num_query_groups, shape.head_size)
    return equal_shards(part.shape[part.axis], owners)


def choose_writers(layout: Layout, shard_map: ShardMap) -> list[int]:
    """Chooses for each file the rank that has most of what goes into it, the least busy one where several have."""
    writers: list[int] = []
    for file in range(len(layout.files)):
        held: Counter[int] = Counter()
        # One block stands for all: those of a file come from neighbouring ranks, and the writer is a matter of speed.
        for tensor in max(layout.blocks(file), key=len):
            for transfer in transfers(tensor, partial(holders, shard_map=shard_map, shape=layout.shape)):
                held[transfer.rank] += transfer.num_bytes
        most = max(held.values())
        candidates = [rank for rank in sorted(held) if held[rank] == most]
        writers.append(min(candidates, key=writers.count))
    return writers


def cut(packed: Packed, transfer: Transfer) -> torch.Tensor:
    """Cuts the slice that a transfer names from the packed tensors of its module."""
    tensor = packed[transfer.part.rows, transfer.part.field]
    return tensor.narrow(transfer.axis, transfer.start, transfer.stop - transfer.start) if tensor.dim() else tensor


def assemble(tensor: FileTensor, pieces: Sequence[tuple[Transfer, torch.Tensor]]) -> torch.Tensor:
    """Puts slices in their places in a file's tensor; the rest of it is zero."""
    if len(pieces) == 1 and pieces[0][1].shape == tensor.shape:
        return pieces[0][1]
    whole = torch.zeros(tensor.shape, dtype=tensor.dtype)
    for transfer, piece in pieces:
        stacked = len(transfer.target) - piece.dim()
        place = transfer.target[:stacked] + tuple(
            slice(offset, offset + size) for offset, size in zip(transfer.target[stacked:], piece.shape, strict=True)
        )
        whole[place] = piece
    return whole


class _BlockExchange:
    """The traffic of one block: what each rank sends to each writer, in an order that all ranks agree on."""

    def __init__(self, blocks: list[Block], writers: list[int], shard_map: ShardMap, shape: ModelSpec) -> None:
        find = partial(holders, shard_map=shard_map, shape=shape)
        self.wanted = [
            (file, tensor, list(transfers(tensor, find))) for file, block in enumerate(blocks) for tensor in block
        ]
        self.traffic: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        for file, _, parts in self.wanted:
            for transfer in parts:
                self.traffic[transfer.rank, writers[file]].append(transfer)

    def run(self, rank: int, pack: PackModule) -> dict[Transfer, torch.Tensor]:
        """Sends this rank's slices and receives those for its files; returns the slices for its files."""
        sending: list[tuple[Any, torch.Tensor]] = []
        for (source, target), parts in self.traffic.items():
            if source == rank and target != rank:
                message = torch.cat(
                    [cut(pack(t.part.module), t).contiguous().reshape(-1).view(torch.uint8) for t in parts]
                )
                sending.append((dist.isend(message, target), message))
        slices: dict[Transfer, torch.Tensor] = {}
        for (source, target), parts in self.traffic.items():
            if target != rank:
                continue
            if source == rank:
                slices |= {t: cut(pack(t.part.module), t) for t in parts}
                continue
            message = torch.empty(sum(t.num_bytes for t in parts), dtype=torch.uint8)
            dist.recv(message, source)
            for transfer, piece in zip(parts, message.split([t.num_bytes for t in parts]), strict=True):
                # A slice may begin at any byte of the message; its dtype wants it aligned.
                slices[transfer] = piece.clone().view(transfer.tensor.dtype).reshape(transfer.shape)
        for work, _ in sending:
            work.wait()
        return slices


class LayoutWriter:
    """Writes the files of a layout table block by block; every rank has one, and uses it in a ``with`` block.

    Args:
        directory: An existing directory that all ranks see.
        layout: The files.
        pack: Packs a module of this rank; called once for each module and block.
        shard_map: Who holds what.
        rank: This rank.
        resume: Continue files that are there already: blocks that are not written again keep what they have.

    Attributes:
        files: The files that this rank writes.
    """

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        pack: PackModule,
        shard_map: ShardMap,
        rank: int,
        resume: bool = False,
    ) -> None:
        self._layout, self._pack, self._shard_map, self._rank = layout, pack, shard_map, rank
        self._writers = choose_writers(layout, shard_map)
        self._tables = [[list(block) for block in layout.blocks(file)] for file in range(len(layout.files))]
        mine = [file for file, writer in enumerate(self._writers) if writer == rank]
        self.files = [directory / layout.files[file] for file in mine]
        self._streams: dict[int, SafetensorsStream] = {}
        self._checksums: dict[int, Future[str]] = {}
        self._open = ExitStack()
        for file, path in zip(mine, self.files, strict=True):
            specs = (TensorSpec(t.name, t.dtype, t.shape) for block in self._tables[file] for t in block)
            stream = SafetensorsStream(path, specs, layout.metadata(file), resume)
            self._streams[file] = self._open.enter_context(stream)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are: embedding, layers and head."""
        return len(self._tables[0])

    def write(self, block: int) -> None:
        """Begins to write one block; every rank calls it, whether it holds the block or not.

        Raises:
            OSError: If the block before could not be written.
        """
        self._wait()
        blocks = [table[block] for table in self._tables]
        exchange = _BlockExchange(blocks, self._writers, self._shard_map, self._layout.shape)
        with torch.inference_mode():
            slices = exchange.run(self._rank, cache(self._pack))
            for file, tensor, parts in exchange.wanted:
                if file in self._streams:
                    self._streams[file].write(tensor.name, assemble(tensor, [(t, slices[t]) for t in parts]))
        # Without a GPU to work beside it nothing is gained, and the packed block and what is read for checksums would
        # take up memory.
        if torch.cuda.is_available():
            self._sum_up()
        else:
            self._wait()

    def _wait(self) -> None:
        """Returns when what was begun is written."""
        for stream in self._streams.values():
            stream.wait()

    def _sum_up(self) -> None:
        """Begins to compute the checksums of files that have become complete."""
        for file, stream in self._streams.items():
            if stream.is_complete and file not in self._checksums:
                self._checksums[file] = stream.checksum()

    def finish(self) -> dict[Path, str]:
        """Waits until this rank's files are written, and returns their checksums; an incomplete one has none.

        Raises:
            OSError: If something could not be written.
        """
        self._sum_up()
        self._wait()
        by_path = zip(self.files, self._streams, strict=True)
        return {path: self._checksums[file].result() for path, file in by_path if file in self._checksums}

    def skip(self, block: int) -> None:
        """Takes a block for written: it was before this process began."""
        for file, stream in self._streams.items():
            for tensor in self._tables[file][block]:
                stream.skip(tensor.name)

    def sync(self) -> None:
        """Has the operating system put what is written on the disk."""
        for stream in self._streams.values():
            stream.sync()

    def __enter__(self) -> "LayoutWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
