# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Ways of changing a finished directory, and what verify() must say of it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_ptq.verify.checks import Check, verify

from .qnemo_writer import QUANT_ALGO, Recipe, write_manifest

ALGORITHMS = tuple(QUANT_ALGO)

# One directory for each algorithm: two ranks in each of two stages, an odd vocabulary; and two of other decoders.
LAYOUTS = {
    **{name: ("llama3", Recipe(name, tp=2, pp=2, dtype="bfloat16", kv_cache="FP8")) for name in ALGORITHMS},
    "experts": ("mixtral", Recipe("fp8", tp=2, dtype="bfloat16")),
    "starcoder": ("starcoder", Recipe("int8_sq", tp=2, dtype="float16")),
}


def failures(directory: Path) -> list[Check]:
    return [check for check in verify(directory) if not check.ok]


def assert_noticed(directory: Path, *expected: str) -> None:
    """Some check fails, and one of the expected ones if there are any."""
    found = failures(directory)
    assert found
    assert all("\n" not in check.detail and check.detail for check in found)
    if expected:
        assert {check.name for check in found} & set(expected), found


def replace_file(path: Path, content: bytes) -> None:
    """Writes a new file in place of a hard link."""
    path.unlink()
    path.write_bytes(content)


def rank_file(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.safetensors"


@contextmanager
def edited_tensors(directory: Path, rank: int) -> Iterator[dict[str, torch.Tensor]]:
    """One rank's tensors to change; the file is rewritten with its header's metadata, and a manifest that matches."""
    path = rank_file(directory, rank)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    yield tensors
    path.unlink()
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    write_manifest(directory)


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """A JSON file's object to change."""
    content = json.loads(path.read_text())
    yield content
    replace_file(path, json.dumps(content).encode())


def kinds_of_tensors(directory: Path, rank: int) -> list[str]:
    """Names of one rank's tensors outside the layers and of its first layer."""
    names = load_file(rank_file(directory, rank))
    return [name for name in names if ".layers." not in name or ".layers.0." in name]


def exchange_ranks(directory: Path, first: int, second: int) -> None:
    """Gives two ranks each other's file; the manifest is left alone."""
    left, right = rank_file(directory, first), rank_file(directory, second)
    left_content, right_content = left.read_bytes(), right.read_bytes()
    replace_file(left, right_content)
    replace_file(right, left_content)
