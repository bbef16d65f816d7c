# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq convert`: any checkpoint becomes any other, and stays the same model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_yaml
from tests.conftest import Demo
from tests.families import TOKENS
from tests.hostile import copy_of
from tests.ranks import run_ranks

FAMILIES = (
    *("llama31", "gemma"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama32", "mixtral", "qwen2", "qwen3", "qwen3_moe")),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "nemotron", "phi3", "gemma2", "gemma3")),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("starcoder", "starcoder2")),
)

# The last decides how many rows of the embedding are kept; 2.0 had it where a user had set it.
OF_NEMO_20 = (
    *("_target_", "activation_func", "add_bias_linear", "add_qkv_bias", "ffn_hidden_size", "gated_linear_unit"),
    *("hidden_size", "init_method_std", "kv_channels", "layernorm_epsilon", "layernorm_zero_centered_gamma"),
    *("make_vocab_size_divisible_by", "normalization", "num_attention_heads", "num_layers", "num_moe_experts"),
    *("num_query_groups", "position_embedding_type", "qk_layernorm", "rotary_base", "rotary_percent", "scale_factor"),
    *("low_freq_factor", "high_freq_factor", "old_context_len", "seq_len_interpolation_factor", "seq_length"),
    *("share_embeddings_and_output_weights", "window_size", "vocab_size"),
)
GONE_SINCE_NEMO_20 = ("first_pipeline_num_layers", "last_pipeline_num_layers", "pipeline_model_parallel_split_rank")


def convert(source: Path, output: Path, name: str, tokenizer: Path | None = None) -> None:
    """As the command does; for ranks, whose processes have imported NeMo already."""
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.convert import convert as run

    run(source, output, name, tokenizer, Reporter(False))


def values(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {part.live_name: part.read() for part in checkpoint_parts(checkpoint)}


def logits(directory: Path) -> torch.Tensor:
    """What transformers computes."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    tokens = torch.randint(0, TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """NeMo to Hugging Face gives transformers' logits, and back gives equal tensors."""
    source = checkpoint_of(name)
    convert(source, tmp_path / "hf", "hf")
    published = source.with_name(f"{name}.hf")
    expected, found = logits(published), logits(tmp_path / "hf")
    assert torch.equal(found[..., : expected.shape[-1]], expected)
    run_ranks(convert, 1, tmp_path / "hf", tmp_path / "nemo", "nemo")
    before, after = values(source), values(tmp_path / "nemo")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def restored(source: Path, root: Path) -> list[str]:
    """Names of this rank's parameters that Megatron restores otherwise than they are in a NeMo checkpoint."""
    from megatron.core import dist_checkpointing

    from tests import steps

    with steps.loaded(source, 2) as model:
        expected = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
        for parameter in model.module.parameters():
            parameter.data.zero_()
        state = {"model": model.module.sharded_state_dict(prefix="")}
        read = dist_checkpointing.load(state, str(root / "release"))
        model.module.load_state_dict(read["model"], strict=False)
        return [name for name, found in model.module.named_parameters() if not torch.equal(found, expected[name])]


@pytest.mark.parametrize("name", ["qwen3", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_megatron_restores_it_at_another_parallelism(
    name: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from nemo_ptq.checkpoint.inert import read_saved

    source = checkpoint_of(name)
    run_ranks(convert, 1, source, tmp_path / "megatron", "megatron")
    assert run_ranks(restored, 2, source, tmp_path / "megatron") == [[], []]
    arguments = read_saved(tmp_path / "megatron" / "release" / "common.pt")["args"]
    assert (arguments.num_layers, arguments.qk_layernorm) == (2, name == "qwen3")
    convert(tmp_path / "megatron", tmp_path / "hf", "hf")
    found = logits(tmp_path / "hf")
    assert torch.equal(found, logits(source.with_name(f"{name}.hf"))[..., : found.shape[-1]])


def test_another_format_is_told(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match="--format gguf is not known: choose one of hf, nemo, megatron"):
        convert(tmp_path, tmp_path / "out", "gguf")


def test_a_context_of_nemo_20(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """NeMo 2.0 wrote half of the fields, and three that are gone; what is kept here, it had."""
    old = tmp_path / "model--val_loss=1.23-step=99-last"
    shutil.copytree(checkpoint_of("llama31"), old)
    file = old / "context" / "model.yaml"
    model = read_yaml(file)
    model["config"] = {name: value for name, value in model["config"].items() if name in OF_NEMO_20}
    model["config"] |= dict.fromkeys(GONE_SINCE_NEMO_20)
    file.write_text(yaml.safe_dump(model))
    for source, output in ((checkpoint_of("llama31"), "new"), (old, "old")):
        convert(source, tmp_path / output, "hf")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_a_class_that_is_not_nemos(demo: Demo, tmp_path: Path) -> None:
    own = copy_of(demo.checkpoint, tmp_path / "own--val_loss=1.2-step=9-last")
    file = own / "context" / "model.yaml"
    file.write_text(file.read_text().replace("nemo.collections.llm.gpt.model.llama.LlamaConfig", "my_models.MyConfig"))
    with pytest.raises(PtqError, match=r"is of my_models.MyConfig, a class that is not NeMo's: if it changes nothing"):
        convert(own, tmp_path / "out", "hf")


def test_what_stands_there_is_left_alone(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(PtqError, match="exists: choose another output"):
        convert(checkpoint_of("gemma"), tmp_path / "there", "hf")


def test_megatron_lm_has_no_gemma(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"no arguments for the scaled embedding of Gemma, .*: choose another format"):
        convert(checkpoint_of("gemma"), tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()
