# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Files written tensor by tensor are those that the safetensors library writes in one go."""

import errno
import os
import tempfile
from pathlib import Path
from random import Random

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_ptq.export.safetensors_stream import SafetensorsStream, TensorSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tuple(tensor.shape))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text('abc.0é"', min_size=1, max_size=8), unique=True, max_size=6))
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    return {name: random_tensor(draw(st.sampled_from(DTYPES)), draw(shapes), seed) for seed, name in enumerate(names)}


@given(tensors(), st.sampled_from([{}, {"rank": "0"}]), st.randoms())
def test_bytes_are_those_of_the_library(
    drawn: dict[str, torch.Tensor], metadata: dict[str, str], random: Random
) -> None:
    order = list(drawn.items())
    random.shuffle(order)
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = Path(directory, "ours"), Path(directory, "theirs")
        save_file(drawn, theirs, metadata or None)
        with SafetensorsStream(ours, (spec_of(name, tensor) for name, tensor in order), metadata) as stream:
            for name, tensor in reversed(order):
                stream.write(name, tensor)
        assert ours.read_bytes() == theirs.read_bytes()


def test_slices_of_larger_tensors_are_written_whole(tmp_path: Path) -> None:
    large = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    with SafetensorsStream(tmp_path / "file", [TensorSpec("slice", torch.float32, (6, 2))]) as stream:
        stream.write("slice", large.T[:, 1:3])
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert torch.equal(file.get_tensor("slice"), large.T[:, 1:3])
        assert file.metadata() is None


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, 1)]
)
def test_another_tensor_than_announced_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    stream = SafetensorsStream(tmp_path / "file", [TensorSpec("weight", torch.float32, (2, 3))])
    with pytest.raises(ValueError, match=r"weight was announced as torch.float32 \(2, 3\), got"), stream:
        stream.write("weight", tensor)


def test_an_unannounced_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError), SafetensorsStream(tmp_path / "file", []) as stream:
        stream.write("weight", torch.zeros(2))


def test_a_missing_tensor_is_noticed(tmp_path: Path) -> None:
    specs = [TensorSpec(name, torch.int8, (2,)) for name in ("a", "b", "c")]
    with (
        pytest.raises(ValueError, match="announced but not written: a, c"),
        SafetensorsStream(tmp_path / "file", specs) as stream,
    ):
        stream.write("b", torch.zeros(2, dtype=torch.int8))


def test_the_first_error_is_the_one_that_is_raised(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="the reason"),
        SafetensorsStream(tmp_path / "file", [TensorSpec("a", torch.int8, (2,))]),
    ):
        raise RuntimeError("the reason")


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        SafetensorsStream(tmp_path / "file", [])
    assert (tmp_path / "file").read_text() == "precious"


def test_what_could_not_be_written_is_raised_by_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OSError, match="No space left"),
        SafetensorsStream(tmp_path / "file", [TensorSpec("a", torch.int8, (2,))]) as stream,
    ):
        stream.wait()
        monkeypatch.setattr(os, "pwrite", fail)
        stream.write("a", torch.zeros(2, dtype=torch.int8))
        stream.wait()


def test_the_checksum_is_that_of_the_whole_file(tmp_path: Path) -> None:
    specs = [TensorSpec(name, torch.int8, (2,)) for name in ("a", "b")]
    with SafetensorsStream(tmp_path / "file", specs) as stream:
        stream.skip("a")
        assert not stream.is_complete
        stream.write("b", torch.ones(2, dtype=torch.int8))
        assert stream.is_complete
        checksum = stream.checksum()
    assert checksum.result() == blake3((tmp_path / "file").read_bytes()).hexdigest()


def test_space_is_claimed_before_the_first_tensor(tmp_path: Path) -> None:
    with SafetensorsStream(tmp_path / "file", [TensorSpec("a", torch.float32, (1000, 1000))]) as stream:
        stream.wait()
        assert (tmp_path / "file").stat().st_size > 4_000_000
        stream.write("a", torch.ones(1000, 1000))
