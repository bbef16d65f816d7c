# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Megatron-LM and Megatron-Bridge, written by megatron-core on one, two and four ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.engine.test_run import run_task
from tests.families import VOCAB
from tests.files import digests
from tests.megatron import ARGUMENTS, ITERATION, as_bridge, called, training_arguments, write_megatron_lm
from tests.ranks import run_ranks

Maker = Callable[..., Path]
FAST = ("llama3", "mixtral", "gpt")
# Written as Megatron-Core 0.19 does; the others as it did up to 0.18.
NEWER = ("gpt", "qwen3")
# Megatron-Bridge's description of tests/families.py's llama3.
LLAMA = {
    "activation_func": called("torch.nn.functional.silu"),
    "add_bias_linear": False,
    "attention_backend": called("megatron.core.transformer.enums.AttnBackend", 5),
    "bf16": True,
    "ffn_hidden_size": 512,
    "gated_linear_unit": True,
    "generation_config": {"_target_": "transformers.GenerationConfig.from_dict", "_call_": True, "config_dict": {}},
    "hf_model_id": "/models/llama",
    "hidden_size": 256,
    "init_method": {"_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "mean": 0.0, "std": 0.02},
    "init_method_std": 0.02,
    "kv_channels": 32,
    "layernorm_epsilon": 1e-6,
    "make_vocab_size_divisible_by": 128,
    "normalization": "RMSNorm",
    "num_attention_heads": 8,
    "num_layers": 2,
    "num_query_groups": 4,
    "params_dtype": called("torch.bfloat16"),
    "position_embedding_type": "rope",
    "rope_scaling": False,
    "rope_scaling_factor": 1.0,
    "rotary_base": 500000.0,
    "rotary_percent": 1.0,
    "seq_length": 256,
    "share_embeddings_and_output_weights": False,
    "should_pad_vocab": True,
    "tensor_model_parallel_size": 2,
    "vocab_size": VOCAB,
}
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"


@pytest.fixture(scope="module")
def megatron_lm(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Writes what Megatron-LM leaves of a model of tests/families.py, once; not to be changed."""
    made: dict[tuple[object, ...], Path] = {}

    def make(name: str, layout: tuple[int, int] = (1, 1)) -> Path:
        if (name, layout) not in made:
            root = tmp_path_factory.mktemp("megatron") / name
            arguments = training_arguments(**ARGUMENTS[name])
            ranks = layout[0] * layout[1]
            run_ranks(write_megatron_lm, ranks, checkpoint_of(name), root, arguments, layout, name in NEWER)
            made[name, layout] = root
        return made[name, layout]

    return make


@pytest.fixture(scope="module")
def bridge(
    megatron_lm: Maker, checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[int, int]], Path]:
    """Makes what Megatron-Bridge leaves of llama3."""

    def make(layout: tuple[int, int]) -> Path:
        tokenizer = checkpoint_of("llama3").with_name("llama3.hf")
        root = tmp_path_factory.mktemp("bridge") / "llama3"
        return as_bridge(megatron_lm("llama3", layout), root, PROVIDER, LLAMA, tokenizer)

    return make


def values_of(parts: list[TensorPart]) -> dict[str, torch.Tensor]:
    return {part.live_name: part.read() for part in parts}


def parts_of(checkpoint: Path) -> list[TensorPart]:
    from nemo_ptq.checkpoint.megatron.model import MegatronModel

    return MegatronModel(checkpoint).parts


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARGUMENTS]
)
def test_the_model_is_the_one_that_was_trained(
    name: str, megatron_lm: Maker, checkpoint_of: Callable[[str], Path]
) -> None:
    source, root = checkpoint_of(name), megatron_lm(name)
    assert (root / ITERATION / "common.pt").exists() == (name not in NEWER)
    assert read_metadata(root) == read_metadata(source)
    found, expected = values_of(parts_of(root)), values_of(checkpoint_parts(source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # The reader that shares nothing with this one computes the same of both.
    tokens = torch.arange(40).reshape(1, -1)
    assert torch.equal(logits(root, tokens), logits(source, tokens))
    # There is no manifest, and nothing else is wrong.
    assert [check.name for check in verify(root) if not check.ok] == ["manifest"]


def shards(checkpoint: Path, layout: tuple[int, int]) -> dict[str, torch.Tensor]:
    """This rank's parameters."""
    from tests import steps

    with steps.loaded(checkpoint, *layout) as model:
        return {name: parameter.clone() for name, parameter in model.module.named_parameters()}


@pytest.mark.parametrize("written", [(2, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_it_is_read_at_any_parallelism(
    written: tuple[int, int], bridge: Callable[[tuple[int, int]], Path], checkpoint_of: Callable[[str], Path]
) -> None:
    """Two or four ranks have written it; the rows that they have padded the vocabulary with are left out."""
    source, root = checkpoint_of("llama3"), bridge(written)
    assert read_metadata(root) == read_metadata(source)
    tokens = torch.arange(40).reshape(1, -1)
    assert torch.equal(logits(root, tokens), logits(source, tokens))
    for layout in ((1, 1), (2, 1), (1, 2)):
        ranks = layout[0] * layout[1]
        found, expected = (run_ranks(shards, ranks, path, layout) for path in (root, source))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def quantize(source: Path, output: Path, data: Path, layout: tuple[int, int], **task: Any) -> None:
    quantization = QuantizationConfig("fp8", quality="fast", calibration_dataset=str(data), calibration_seq_len=16)
    task |= {
        "nemo_checkpoint": str(source),
        "export_config": ExportConfig(path=str(output)),
        "quantization_config": quantization,
        "calibration_tp": layout[0],
        "calibration_pp": layout[1],
    }
    run_ranks(run_task, layout[0] * layout[1], task)


@pytest.mark.parametrize("layout", [(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)])
def test_its_export_is_that_of_the_nemo_checkpoint(
    layout: tuple[int, int],
    bridge: Callable[[tuple[int, int]], Path],
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    data = tmp_path / "data.txt"
    data.write_text("def add(a, b): return a + b\nThe quick brown fox jumps over the lazy dog.\n" * 4)
    quantize(checkpoint_of("llama3"), tmp_path / "nemo", data, layout)
    quantize(bridge((2, 1)), tmp_path / "bridge", data, layout)
    expected, found = digests(tmp_path / "nemo"), digests(tmp_path / "bridge")
    for name in ("config.json", "rank0.safetensors"):
        assert found[name] == expected[name]


def test_megatron_lm_comes_without_a_tokenizer(
    megatron_lm: Maker, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from nemo_ptq.plan.rules.tokenizer import tokenizer_is_given

    root = megatron_lm("llama3")
    model = read_metadata(root)
    assert "has no tokenizer/ in it" in str(tokenizer_is_given(model, root, None))
    assert tokenizer_is_given(model, root, "/somewhere") is None
    assert tokenizer_is_given(model, checkpoint_of("llama3"), None) is None
