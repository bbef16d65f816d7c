# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A pickle from outside takes no more memory than its size explains, and no time without end, whoever reads it."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import pytest
import torch

from nemo_ptq.checkpoint.huggingface.hf_weights import load_tensors
from nemo_ptq.checkpoint.index import Chunk
from nemo_ptq.checkpoint.inert import InertUnpickler, read_saved
from nemo_ptq.checkpoint.torch_dist import read_chunk
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted_pickles import check_saved, load_saved
from nemo_ptq.verify.nemo.sharded_tensors import PlainUnpickler
from nemo_ptq.verify.tensor_file import TorchFile

pytestmark = pytest.mark.timeout(20)

MEGABYTE = 1 << 20
# An empty tuple or list, and sixty times a pair of what came before.
PAIRS_OF_PAIRS = b")" + b"2\x86" * 60
LISTS_OF_LISTS = b"]" + b"".join(b"q\x00]h\x00ah\x00a" for _ in range(60))


def call(function: str, number: int) -> bytes:
    """A pickle that calls a function with a number."""
    module, _, name = function.rpartition(".")
    return b"\x80\x02c%b\n%b\n\x8a\x05%b\x85R." % (module.encode(), name.encode(), struct.pack("<q", number)[:5])


BOMBS = {
    "an entry of the memo far away": b"\x80\x02Nr" + struct.pack("<I", 1 << 24) + b".",
    "bytes that do not follow": b"\x80\x05\x96" + struct.pack("<Q", 1 << 28) + b".",
    "a key of pairs of pairs": b"\x80\x02}" + PAIRS_OF_PAIRS + b"Ns.",
    "a set of pairs of pairs": b"\x80\x04\x8f(" + PAIRS_OF_PAIRS + b"\x90.",
    "lists of lists": b"\x80\x02" + LISTS_OF_LISTS + b".",
    "a size of many axes": b"\x80\x02ctorch\nSize\n](" + b"K\x01" * 100_000 + b"e\x85R.",
}


def archive(content: bytes, compression: int = zipfile.ZIP_STORED, further: bytes = b"") -> bytes:
    """A file like those of ``torch.save``."""
    file = io.BytesIO()
    with ZipFile(file, "w", compression) as written:
        written.writestr("archive/data.pkl", content)
        written.writestr("archive/data/0", further)
    return file.getvalue()


ZEROS = bytes(32 * MEGABYTE)
ARCHIVES = {
    "compressed zeros": (archive(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, ZEROS), "compressed"),
    "a compressed pickle": (archive(b"\x80\x02" + b"N0" * 16 * MEGABYTE + b"N.", zipfile.ZIP_DEFLATED), "compressed"),
    "a bytearray": (archive(call("__builtin__.bytearray", 1 << 28)), "it calls __builtin__.bytearray"),
    "a tensor's class": (archive(call("torch.FloatTensor", 1 << 26)), "it calls torch.FloatTensor"),
    "a storage's class": (archive(call("torch.UntypedStorage", 1 << 28)), "it calls torch.UntypedStorage"),
    "a key of pairs of pairs": (archive(b"\x80\x02}" + PAIRS_OF_PAIRS + b"Ns."), "a key of nested tuples"),
    "a call of set": (
        archive(b"\x80\x02c__builtin__\nset\n](" + PAIRS_OF_PAIRS + b"e\x85R."),
        "a key of nested tuples",
    ),
}
# They take seconds to make, and are small.
assert max(len(content) for content, _ in ARCHIVES.values()) < MEGABYTE


def peak_of(read: Callable[[], Any]) -> int:
    """Bytes that Python allocates at the most while something is refused."""
    tracemalloc.start()
    try:
        with pytest.raises((pickle.UnpicklingError, PtqError, BadZipFile, KeyError)):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("unpickler", [InertUnpickler, PlainUnpickler])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_pickle_takes_little(bomb: str, unpickler: type[InertUnpickler]) -> None:
    if bomb == "an entry of the memo far away":  # of which Python's unpickler makes nothing
        tracemalloc.start()
        assert unpickler(io.BytesIO(BOMBS[bomb])).load() is None
        assert tracemalloc.get_traced_memory()[1] < 16 * MEGABYTE
        tracemalloc.stop()
    else:
        assert peak_of(unpickler(io.BytesIO(BOMBS[bomb])).load) < 16 * MEGABYTE


@pytest.mark.parametrize("unpickler", [InertUnpickler, PlainUnpickler])
def test_what_is_small_is_read(unpickler: type[InertUnpickler]) -> None:
    value = {"a": [1, (2, 3)], (4, "b"): {5, 6}, "again": [["shared"]] * 3, "none": None}
    assert unpickler(io.BytesIO(pickle.dumps(value, 4))).load() == value
    found = unpickler(io.BytesIO(pickle.dumps(Namespace(layers=2, shape=torch.Size((3, 4)))))).load()
    assert (found.layers, found.shape) == (2, (3, 4))


@pytest.mark.parametrize("kind", ARCHIVES)
def test_every_reader_of_torchs_files_refuses_a_bomb(kind: str, tmp_path: Path) -> None:
    content, reason = ARCHIVES[kind]
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    chunk = Chunk("name", (0,), (1,), file.name, 0, len(content))
    for read in (lambda: read_chunk(tmp_path, chunk), lambda: load_tensors(file), lambda: TorchFile(file).header):
        assert peak_of(read) < 16 * MEGABYTE
    with pytest.raises(PtqError, match=reason) as caught:
        load_tensors(file)
    assert "\n" not in str(caught.value)


def test_arguments_are_not_unpacked(tmp_path: Path) -> None:
    content, _ = ARCHIVES["a compressed pickle"]
    (tmp_path / "common.pt").write_bytes(content)
    assert peak_of(lambda: read_saved(tmp_path / "common.pt")) < 16 * MEGABYTE
    assert peak_of(lambda: load_saved(io.BytesIO(content), PlainUnpickler)) < 16 * MEGABYTE


def test_what_torch_saves_is_let_through() -> None:
    values = {
        "tensor": torch.arange(6.0).view(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "types": [torch.bfloat16, torch.Size((1, 2)), torch.device("cpu"), 1j, b"bytes", {"set"}],
        "shared": [torch.zeros(2)] * 2,
    }
    file = io.BytesIO()
    torch.save(values, file)
    names = [record.filename for record in check_saved(file, len(file.getvalue()))]
    assert "archive/data.pkl" in names
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True).keys() == values.keys()
