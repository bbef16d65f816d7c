# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Merging rank files: whatever the layout, the global tensors are those of a single rank."""

import json
from pathlib import Path

import pytest
import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.model_config import parse_config
from nemo_ptq.verify.trtllm.expected_tensors import Part, Shard
from nemo_ptq.verify.trtllm.trtllm_reader import merge, open_checkpoint, same_bytes, split_qkv
from tests.verify.conftest import Copy, Pristine
from tests.verify.damage import ALGORITHMS, edited_json, edited_tensors
from tests.verify.qnemo_writer import Recipe
from tests.verify.reference import VOCAB


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize(
    "family, algorithm",
    [*(("llama3", name) for name in ALGORITHMS), ("mixtral", "fp8"), ("starcoder", "int8_sq"), ("gemma", "fp8")],
)
def test_merged_tensors_are_those_of_one_rank(
    pristine: Pristine, family: str, algorithm: str, tp: int, pp: int
) -> None:
    one = open_checkpoint(pristine(family, Recipe(algorithm, group=64)))
    many = open_checkpoint(pristine(family, Recipe(algorithm, tp=tp, pp=pp, group=64)))
    assert set(one.names()) <= set(many.names()) <= set(one.names()) | {"lm_head.weight"}
    for name in one.names():
        assert same_bytes(one.tensor(name), many.tensor(name)), name


def test_query_key_and_value_rows(pristine: Pristine) -> None:
    one, many = (open_checkpoint(pristine("llama3", Recipe(tp=tp))) for tp in (1, 4))
    name = "transformer.layers.1.attention.qkv.weight"
    query, key, value = split_qkv(many.config, many.tensor(name))
    assert (query.shape, key.shape, value.shape) == ((256, 256), (128, 256), (128, 256))
    assert torch.equal(torch.cat((query, key, value)), one.tensor(name))


def test_vocabulary_padding_is_dropped(pristine: Pristine) -> None:
    checkpoint = open_checkpoint(pristine("llama3", Recipe(tp=2)))
    assert checkpoint.rank_files[1].header["lm_head.weight"] == ("F32", (66, 256))
    assert checkpoint.tensor("lm_head.weight").shape == (VOCAB, 256)
    assert checkpoint.tensor("transformer.vocab_embedding.weight").shape == (VOCAB, 256)


def test_merge_takes_replicas_once_and_parts_apart() -> None:
    shard = Shard(0, (Part(2), Part(1, replicas=2)))
    pieces = [torch.tensor([*own, copy]) for own, copy in (((0, 1), 10), ((2, 3), 10), ((4, 5), 11), ((6, 7), 11))]
    assert merge(pieces, shard).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]


def test_nan_equals_itself_bit_for_bit() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bytes(nan, nan.double())


def test_a_tensor_that_is_not_what_config_json_promises_is_an_error(copy: Copy) -> None:
    directory = copy("llama3", Recipe("fp8", tp=2))
    name = "transformer.layers.0.mlp.fc.weight"
    with edited_tensors(directory, 1) as tensors:
        tensors[name] = tensors[name].float()
    with pytest.raises(PtqError, match=r"rank1\.safetensors: transformer\.layers\.0\.mlp\.fc\.weight is \('F32'"):
        open_checkpoint(directory).tensor(name)
    with pytest.raises(PtqError, match=r"promises no tensor transformer\.nothing"):
        open_checkpoint(directory).tensor("transformer.nothing")


def test_every_problem_of_config_json_is_said_at_once(copy: Copy) -> None:
    directory = copy("llama3", Recipe("fp8"))
    with edited_json(directory / "config.json") as config:
        del config["hidden_size"]
        config["vocab_size"], config["mapping"]["tp_size"] = "many", 0
    with pytest.raises(PtqError) as raised:
        open_checkpoint(directory)
    assert str(raised.value).splitlines() == [
        "config.json: hidden_size is missing, expected a positive integer",
        "config.json: vocab_size is 'many', expected a positive integer",
        "config.json: mapping.tp_size is 0, expected a positive integer up to 10000",
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"hidden_size": NaN}', "\x00", "[" * 100000])
def test_what_is_no_json_object_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PtqError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_defaults_are_the_readers() -> None:
    required = {
        "architecture": "GPTForCausalLM",
        "dtype": "float16",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 10,
    }
    config = parse_config(required)
    assert (config.decoder, config.head_size, config.num_key_value_heads, config.intermediate_size) == (
        "gpt",
        16,
        4,
        256,
    )
    assert config.position_embedding_type == "learned_absolute"
    assert config.attention_bias and config.mlp_bias and config.mapping.world_size == 1
    llama = parse_config(required | {"architecture": "LlamaForCausalLM"})
    assert llama.rmsnorm and llama.gated and not llama.attention_bias and not llama.mlp_bias
    empty = parse_config(required | {"quantization": json.loads('{"quant_algo": "FP8", "exclude_modules": []}')})
    assert empty.quantization.algorithm_of("lm_head") is None
    assert empty.quantization.algorithm_of("transformer.layers.0.mlp.fc") == "FP8"
