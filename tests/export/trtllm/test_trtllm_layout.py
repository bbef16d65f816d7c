# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The layout table against the reader's own, and against whole tensors that tests put together by hand."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from nemo_ptq.export.layout import FileTensor, Part
from nemo_ptq.export.trtllm.trtllm_config import qnemo_config
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.registry import Family
from nemo_ptq.quantization.schemes import UNQUANTIZED
from nemo_ptq.verify.model_config import parse_config
from nemo_ptq.verify.trtllm.expected_tensors import TensorSpec, rank_tensors
from nemo_ptq.verify.trtllm.trtllm_reader import merge
from tests.export.shapes import GEMMA, GPT, LLAMA, MIXTRAL, STARCODER, families_and_layouts, layout

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def tensors(files: QnemoLayout, file: int) -> dict[str, FileTensor]:
    """All tensors of a file, by name."""
    found = [tensor for block in files.blocks(file) for tensor in block]
    assert len({tensor.name for tensor in found}) == len(found)
    return {tensor.name: tensor for tensor in found}


def reader_tensors(family: Family, files: QnemoLayout, stage: int) -> dict[str, TensorSpec]:
    """What the reader expects of the files of one pipeline stage, from config.json alone."""
    return rank_tensors(parse_config(qnemo_config(files, family, "0")), stage)


def fill(tensor: FileTensor, source: Callable[[Part], np.ndarray]) -> np.ndarray:
    """Puts a tensor together from whole parts, as its placements say."""
    whole = np.zeros(tensor.shape, dtype=np.int64)
    for placement in tensor.placements:
        piece = source(placement.part)
        if piece.ndim:
            piece = piece.take(range(placement.start, placement.stop), axis=placement.axis)
        stacked = len(placement.target) - piece.ndim
        place = placement.target[:stacked] + tuple(
            slice(start, start + size) for start, size in zip(placement.target[stacked:], piece.shape, strict=True)
        )
        assert not whole[place].any(), "two placements overlap"
        whole[place] = piece
    return whole


class WholeModel:
    """Parts of a model, each filled with numbers that no other part has, and none of them zero."""

    def __init__(self) -> None:
        self._arrays: dict[Part, np.ndarray] = {}
        self._next = 1

    def __call__(self, part: Part) -> np.ndarray:
        if part not in self._arrays:
            size = int(np.prod(part.shape))
            self._arrays[part] = np.arange(self._next, self._next + size).reshape(part.shape)
            self._next += size
        return self._arrays[part]

    def find(self, module: str, field: str, rows: str = "") -> np.ndarray:
        (array,) = (
            array
            for part, array in self._arrays.items()
            if (part.module, part.field, part.rows) == (module, field, rows)
        )
        return array


@settings(max_examples=200, deadline=None)
@given(families_and_layouts())
def test_files_have_the_tensors_that_the_reader_expects(drawn: tuple[Family, QnemoLayout]) -> None:
    family, files = drawn
    for file in range(files.world_size):
        expected = {
            name: (spec.dtype, spec.shape)
            for name, spec in reader_tensors(family, files, file // files.tensor_parallel).items()
        }
        found = {name: (DTYPE_NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors(files, file).items()}
        assert found == expected


@settings(max_examples=200, deadline=None)
@given(families_and_layouts())
def test_every_row_of_every_part_lands_once(drawn: tuple[Family, QnemoLayout]) -> None:
    _, files = drawn
    tp, kv = files.tensor_parallel, files.shape.num_query_groups
    landed: dict[tuple[str, Part], Counter[int]] = defaultdict(Counter)
    for file in range(files.world_size):
        for tensor in tensors(files, file).values():
            for placement in tensor.placements:
                assert placement.part.axis in (None, placement.axis)
                landed[tensor.name, placement.part].update(range(placement.start, placement.stop))
    for (name, part), counts in landed.items():
        if part.module == "embedding.position_embeddings":
            copies = 1  # cut in the files, though not in Megatron
        elif part.axis is None:
            copies = tp
        else:
            copies = max(1, tp // kv) if part.rows in ("k", "v") else 1
        extent = part.shape[part.axis or 0] if part.shape else 1
        assert counts == dict.fromkeys(range(extent), copies), name


@settings(max_examples=200, deadline=None)
@given(families_and_layouts())
def test_merged_files_are_the_whole_model(drawn: tuple[Family, QnemoLayout]) -> None:
    family, files = drawn
    model = WholeModel()
    merged: dict[tuple[int, str], np.ndarray] = {}
    for stage in range(files.pipeline_parallel):
        ranks = range(stage * files.tensor_parallel, (stage + 1) * files.tensor_parallel)
        of_ranks = [tensors(files, rank) for rank in ranks]
        for name, spec in reader_tensors(family, files, stage).items():
            pieces = [torch.from_numpy(fill(rank[name], model)) for rank in of_ranks]
            merged[stage, name] = merge(pieces, spec.shard).numpy()
    shape, last = files.shape, files.pipeline_parallel - 1
    for stage in range(files.pipeline_parallel):
        for local in range(shape.num_layers // files.pipeline_parallel):
            layer = stage * (shape.num_layers // files.pipeline_parallel) + local
            prefix, module = f"transformer.layers.{local}.", f"decoder.layers.{layer}."
            found = {key: value for (at, key), value in merged.items() if at == stage and key.startswith(prefix)}
            expected = expected_layer(files, model, module)
            assert found.keys() == {prefix + name for name in expected}
            for name, value in expected.items():
                np.testing.assert_array_equal(found[prefix + name], value, err_msg=name)
    padded = ((0, files.vocab_size - shape.vocab_size), (0, 0))
    words = np.pad(model.find("embedding.word_embeddings", "weight"), padded)
    np.testing.assert_array_equal(merged[0, "transformer.vocab_embedding.weight"], words)
    if shape.position_embedding_type == "learned_absolute":
        positions = model.find("embedding.position_embeddings", "weight")
        np.testing.assert_array_equal(merged[0, "transformer.position_embedding.weight"], positions)
    if not shape.tied_embeddings:
        np.testing.assert_array_equal(
            merged[last, "lm_head.weight"], np.pad(model.find("output_layer", "weight"), padded)
        )
    elif last > 0:
        np.testing.assert_array_equal(merged[last, "lm_head.weight"], words)
    np.testing.assert_array_equal(
        merged[last, "transformer.ln_f.weight"], model.find("decoder.final_layernorm", "weight")
    )


def expected_layer(files: QnemoLayout, model: WholeModel, module: str) -> dict[str, np.ndarray]:
    """The tensors of one layer as a file of a single rank has them, from the description of the format."""
    shape = files.shape
    expected = {}
    norm_fields = ["weight", "bias"] if shape.normalization == "LayerNorm" else ["weight"]
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_layernorm"}
    if shape.gemma:
        norms["pre_mlp_layernorm"] = "pre_feedforward_layernorm"
        norms["post_self_attention_layernorm"] = "post_layernorm"
        norms["post_mlp_layernorm"] = "post_feedforward_layernorm"
    if shape.qk_norm:
        norms |= {f"self_attention.{rows}_layernorm": f"attention.{rows}_layernorm" for rows in "qk"}
    for source, target in norms.items():
        expected |= {f"{target}.{field}": model.find(module + source, field) for field in norm_fields}
    if files.kv_cache:
        for which in ("k", "v", "kv"):
            field = f"{which}_cache_scaling_factor"
            expected[f"attention.{field}"] = model.find(module + "self_attention.core_attention", field)

    def linear(source: str, target: str, rows: tuple[str, ...], bias: bool) -> dict[str, np.ndarray]:
        scheme = files.schemes.get(module + source, UNQUANTIZED)
        of_rows = {field.suffix: field.column_axis == 0 for field in scheme.fields} | ({"bias": True} if bias else {})
        return {
            f"{target}.{field}": np.concatenate([model.find(module + source, field, group) for group in rows])
            if has_rows
            else model.find(module + source, field)
            for field, has_rows in of_rows.items()
            # All experts get the same input, with one scale.
            if field != "activation_scaling_factor" or "local_experts" not in source
        }

    expected |= linear("self_attention.linear_qkv", "attention.qkv", ("q", "k", "v"), shape.qkv_bias)
    expected |= linear("self_attention.linear_proj", "attention.dense", ("",), shape.linear_bias)
    if not shape.num_experts:
        if shape.gated_mlp:
            expected |= linear("mlp.linear_fc1", "mlp.fc", ("gate",), shape.linear_bias)
            expected |= linear("mlp.linear_fc1", "mlp.gate", ("up",), shape.linear_bias)
        else:
            expected |= linear("mlp.linear_fc1", "mlp.fc", ("",), shape.linear_bias)
        expected |= linear("mlp.linear_fc2", "mlp.proj", ("",), shape.linear_bias)
        return expected
    expected["mlp.router.weight"] = model.find(module + "mlp.router", "weight")
    for source, target, rows in (("linear_fc1", "mlp.fc", ("up", "gate")), ("linear_fc2", "mlp.proj", ("",))):
        of_experts = [
            linear(f"mlp.experts.local_experts.{expert}.{source}", target, rows, False)
            for expert in range(shape.num_experts)
        ]
        expected |= {name: np.stack([expert[name] for expert in of_experts]) for name in of_experts[0]}
        if files.schemes:
            first = module + f"mlp.experts.local_experts.0.{source}"
            expected[f"{target}.activation_scaling_factor"] = model.find(first, "activation_scaling_factor")
    return expected


def test_vocabulary_is_padded_where_it_does_not_divide() -> None:
    files = layout(replace(LLAMA, vocab_size=37), tp=4)
    model = WholeModel()
    shards = [fill(tensors(files, file)["transformer.vocab_embedding.weight"], model) for file in range(4)]
    assert [shard.shape[0] for shard in shards] == [10] * 4
    whole = model.find("embedding.word_embeddings", "weight")
    np.testing.assert_array_equal(np.concatenate(shards)[:37], whole)
    assert not np.concatenate(shards)[37:].any()
    assert files.vocab_size == 37


@pytest.mark.parametrize(("algorithm", "padded"), [("W4A16_AWQ", 64), ("W4A8_AWQ", 64), ("NVFP4", 37), ("FP8", 37)])
def test_awq_pads_the_vocabulary_to_64(algorithm: str, padded: int) -> None:
    files = layout(LLAMA, algorithm)
    assert files.vocab_size == padded
    for name in ("transformer.vocab_embedding.weight", "lm_head.weight"):
        assert tensors(files, 0)[name].shape == (padded, LLAMA.hidden_size)


def test_tied_output_layer_is_written_where_the_embedding_is_not() -> None:
    alone = layout(GEMMA, pp=1)
    assert "lm_head.weight" not in tensors(alone, 0)
    first, last = (tensors(layout(GEMMA, pp=2), file) for file in range(2))
    assert "lm_head.weight" not in first
    model = WholeModel()
    embedding, head = fill(first["transformer.vocab_embedding.weight"], model), fill(last["lm_head.weight"], model)
    np.testing.assert_array_equal(embedding, head)


def test_each_rank_has_the_activated_half_of_its_experts_second() -> None:
    files = layout(MIXTRAL, "FP8", tp=2)
    model = WholeModel()
    shards = [fill(tensors(files, file)["transformer.layers.0.mlp.fc.weight"], model) for file in range(2)]
    half = MIXTRAL.ffn_hidden_size // 2
    for expert in range(MIXTRAL.num_experts):
        module = f"decoder.layers.0.mlp.experts.local_experts.{expert}.linear_fc1"
        gate, up = (model.find(module, "weight", rows) for rows in ("gate", "up"))
        for file, shard in enumerate(shards):
            mine = slice(file * half, (file + 1) * half)
            np.testing.assert_array_equal(shard[expert], np.concatenate([up[mine], gate[mine]]))


def test_learned_positions_are_sharded() -> None:
    files = layout(replace(STARCODER, seq_length=50), tp=4)
    model = WholeModel()
    shards = [fill(tensors(files, file)["transformer.position_embedding.weight"], model) for file in range(4)]
    assert [shard.shape[0] for shard in shards] == [13] * 4
    np.testing.assert_array_equal(np.concatenate(shards)[:50], model.find("embedding.position_embeddings", "weight"))


def test_kv_heads_are_repeated_where_there_are_more_ranks() -> None:
    files = layout(replace(GPT, num_attention_heads=8, num_query_groups=2), tp=4)
    model = WholeModel()
    shards = [fill(tensors(files, file)["transformer.layers.0.attention.qkv.bias"], model) for file in range(4)]
    q, k, v = (model.find("decoder.layers.0.self_attention.linear_qkv", "bias", rows) for rows in "qkv")
    for file, (shard, head) in enumerate(zip(shards, (0, 0, 1, 1), strict=True)):
        one_head = slice(head * GPT.head_size, (head + 1) * GPT.head_size)
        two_heads = slice(file * 2 * GPT.head_size, (file + 1) * 2 * GPT.head_size)
        np.testing.assert_array_equal(shard, np.concatenate([q[two_heads], k[one_head], v[one_head]]))


def test_unquantized_layers_stand_beside_quantized_ones() -> None:
    files = layout(LLAMA, "FP8")
    skipped = "decoder.layers.1.mlp.linear_fc2"
    files = replace(files, schemes={name: scheme for name, scheme in files.schemes.items() if name != skipped})
    found = tensors(files, 0)
    assert found["transformer.layers.0.mlp.proj.weight"].dtype == torch.float8_e4m3fn
    assert found["transformer.layers.1.mlp.proj.weight"].dtype == torch.bfloat16
    assert "transformer.layers.1.mlp.proj.weights_scaling_factor" not in found
