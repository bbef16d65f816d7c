# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""verify() on damaged rank files whose manifest matches the damage."""

import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Copy
from .damage import (
    LAYOUTS,
    assert_noticed,
    edited_tensors,
    exchange_ranks,
    failures,
    kinds_of_tensors,
    rank_file,
    replace_file,
)
from .qnemo_writer import Recipe, write_manifest

Tensors = dict[str, torch.Tensor]


def delete(tensors: Tensors, name: str) -> None:
    del tensors[name]


def rename(tensors: Tensors, name: str) -> None:
    tensors[name + "_"] = tensors.pop(name)


def reshape(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][None]


def cut_off(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].reshape(-1)[:-1]


def retype(tensors: Tensors, name: str) -> None:
    value = tensors[name]
    if value.element_size() == 1:
        tensors[name] = value.view(torch.int8 if value.dtype == torch.uint8 else torch.uint8)
    else:
        tensors[name] = value.to(torch.float16 if value.dtype == torch.float32 else torch.float32)


# What is done to a tensor, and the check that says so.
DAMAGES: tuple[tuple[Callable[[Tensors, str], None], str], ...] = (
    (rename, "names"),
    (reshape, "shapes"),
    (cut_off, "shapes"),
    (retype, "dtypes"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_another_name_shape_or_dtype_are_noticed(copy: Copy, layout: str) -> None:
    directory, recipe = copy(*LAYOUTS[layout]), LAYOUTS[layout][1]
    rank = recipe.tp * recipe.pp - 1
    file = rank_file(directory, rank)
    original = file.read_bytes()
    for index, name in enumerate(kinds_of_tensors(directory, rank)):
        optional = ".k_cache" in name or ".v_cache" in name
        for damage, check in ((delete, "names"), DAMAGES[index % 4], DAMAGES[(index + 1) % 4]):
            with edited_tensors(directory, rank) as tensors:
                damage(tensors, name)
            lone = damage is delete and optional
            assert_noticed(directory, "KV cache scales" if lone else f"{file.name}: {check}")
            replace_file(file, original)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_extra_tensor_is_noticed(copy: Copy, layout: str) -> None:
    directory = copy(*LAYOUTS[layout])
    with edited_tensors(directory, 0) as tensors:
        tensors["transformer.extra.weight"] = torch.ones(2)
    assert_noticed(directory, "rank0.safetensors: names")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_impossible_scales_are_noticed(copy: Copy, layout: str) -> None:
    directory = copy(*LAYOUTS[layout])
    file = rank_file(directory, 1)
    original = file.read_bytes()
    for index, name in enumerate(name for name in kinds_of_tensors(directory, 1) if "scaling_factor" in name):
        value = load_file(file)[name]
        impossible = [float("nan"), 0.0, -1.0]
        if value.element_size() > 1:  # E4M3 has no infinity, and its block scales may be subnormal.
            impossible += [float("inf"), torch.finfo(value.dtype).tiny / 4]
        for number in (impossible[index % 3], impossible[-1 - index % 2]):
            with edited_tensors(directory, 1) as tensors:
                flat = value.float().reshape(-1)
                flat[len(flat) // 2] = number
                tensors[name] = flat.reshape(value.shape).to(value.dtype)
            assert_noticed(directory, "values", "scales")
            replace_file(file, original)


@pytest.mark.parametrize("algorithm", ["no_quant", "fp8", "int8_sq", "int4_awq", "nvfp4"])
def test_weights_that_are_all_zero_are_noticed(copy: Copy, algorithm: str) -> None:
    directory = copy(*LAYOUTS[algorithm])
    for rank in (0, 1):
        with edited_tensors(directory, rank) as tensors:
            tensors["transformer.layers.0.mlp.proj.weight"].zero_()
    assert_noticed(directory, "zeros")


@pytest.mark.parametrize("layout", ["no_quant", "fp8", "experts"])
def test_nan_in_weights_is_noticed(copy: Copy, layout: str) -> None:
    directory = copy(*LAYOUTS[layout])
    with edited_tensors(directory, 1) as tensors:
        weight = tensors["transformer.layers.0.mlp.proj.weight"]
        weight.reshape(-1)[77] = torch.tensor(float("nan")).to(weight.dtype)
    assert_noticed(directory, "values")


@pytest.mark.parametrize("layout", ["fp8", "int8_sq", "experts"])
@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_codes_that_do_not_fit_their_scales_are_noticed(copy: Copy, layout: str, factor: float) -> None:
    """As if the scales had been taken from a weight of another magnitude."""
    directory = copy(*LAYOUTS[layout])
    for rank in (0, 1):
        with edited_tensors(directory, rank) as tensors:
            weight = tensors["transformer.layers.0.mlp.proj.weight"]
            largest = 127 if weight.dtype == torch.int8 else 448
            weight.copy_((weight.float() * factor).clamp(-largest, largest))
    assert_noticed(directory, "ranges")


@pytest.mark.parametrize("layout", ["int4_awq", "w4a8_awq", "nvfp4"])
@pytest.mark.parametrize("byte", [0x11, 0x77])
def test_packed_codes_that_do_not_fit_their_scales_are_noticed(copy: Copy, layout: str, byte: int) -> None:
    directory = copy(*LAYOUTS[layout])
    for rank in (0, 1):
        with edited_tensors(directory, rank) as tensors:
            tensors["transformer.layers.0.attention.qkv.weight"].fill_(byte)
    assert_noticed(directory, "ranges")


def test_w4a8_weights_beyond_fp8_are_noticed(copy: Copy) -> None:
    directory = copy(*LAYOUTS["w4a8_awq"])
    for rank in (0, 1):
        with edited_tensors(directory, rank) as tensors:
            tensors["transformer.layers.0.mlp.fc.weights_scaling_factor_2"].mul_(0.5)
    assert_noticed(directory, "ranges")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_disagree_are_noticed(copy: Copy, layout: str) -> None:
    directory = copy(*LAYOUTS[layout])
    file = rank_file(directory, 1)
    original = file.read_bytes()
    first, second = load_file(rank_file(directory, 0)), load_file(file)
    replicated = [
        name
        for name in kinds_of_tensors(directory, 1)
        if torch.equal(first[name].float(), second[name].float()) and "_cache_" not in name
    ]
    assert any("layernorm" in name for name in replicated)
    for name in replicated:
        with edited_tensors(directory, 1) as tensors:
            tensors[name].mul_(1.25)
        assert_noticed(directory, "ranks agree")
        replace_file(file, original)


def test_kv_cache_scales_that_disagree_are_noticed(copy: Copy) -> None:
    prefix = "transformer.layers.0.attention."
    directory = copy(*LAYOUTS["fp8"])
    with edited_tensors(directory, 0) as tensors:
        tensors[prefix + "k_cache_scaling_factor"].mul_(2)
    assert_noticed(directory, "KV cache scales")

    directory = copy(*LAYOUTS["fp8"])
    with edited_tensors(directory, 0) as tensors:
        for which in ("k", "v", "kv"):
            tensors[f"{prefix}{which}_cache_scaling_factor"].mul_(2)
    assert_noticed(directory, "ranks agree")


def test_copies_of_key_and_value_heads_that_differ_are_noticed(copy: Copy) -> None:
    directory = copy("llama3", Recipe("fp8", tp=4))
    with edited_tensors(directory, 3) as tensors:
        rows = tensors["transformer.layers.1.attention.qkv.weight"]
        rows[-1, -1] = 1 - rows[-1, -1].float()  # The last row of the rank's value head.
    assert_noticed(directory, "ranks agree")


def test_a_shared_embedding_whose_copy_differs_is_noticed(copy: Copy) -> None:
    directory = copy("llama_tied", Recipe("fp8", tp=2, pp=2))
    assert failures(directory) == []
    with edited_tensors(directory, 3) as tensors:
        tensors["lm_head.weight"][0].add_(1)
    assert_noticed(directory, "shared embedding")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exchanged_ranks_are_noticed_without_the_manifest(copy: Copy, layout: str) -> None:
    family, recipe = LAYOUTS[layout]
    world = recipe.tp * recipe.pp
    for first in range(world):
        for second in range(first + 1, world):
            directory = copy(family, recipe)
            exchange_ranks(directory, first, second)
            assert_noticed(directory, "checksums")
            write_manifest(directory)
            assert_noticed(directory, f"rank{first}.safetensors: rank", f"rank{first}.safetensors: names")


def test_exchanged_ranks_of_a_padded_vocabulary_are_noticed_without_any_record(copy: Copy) -> None:
    directory = copy("llama3", Recipe("fp8", tp=2, rank_metadata=False))
    exchange_ranks(directory, 0, 1)
    write_manifest(directory)
    assert_noticed(directory, "padding")


def test_missing_and_stray_rank_files_are_noticed(copy: Copy) -> None:
    directory = copy(*LAYOUTS["fp8"])
    shutil.copy(rank_file(directory, 3), rank_file(directory, 4))
    write_manifest(directory)
    assert_noticed(directory, "rank files")
    rank_file(directory, 4).rename(directory / "model.safetensors")
    write_manifest(directory)
    assert_noticed(directory, "rank files")
    (directory / "model.safetensors").unlink()
    rank_file(directory, 2).unlink()
    write_manifest(directory)
    assert_noticed(directory, "rank files")
