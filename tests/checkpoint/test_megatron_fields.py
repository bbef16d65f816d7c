# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is read of Megatron's options, what is refused by name, and that nothing in the files is run."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_ptq.checkpoint.megatron.classes import choose_class
from nemo_ptq.checkpoint.megatron.directories import is_megatron, iteration_of
from nemo_ptq.checkpoint.megatron.fields import read_fields
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import RotaryScaling
from tests.hostile import Pickled
from tests.megatron import ARGUMENTS, called

LLAMA = ARGUMENTS["llama3"]
BRIDGE = "megatron.bridge.models."


def saved(directory: Path, **changes: Any) -> Path:
    """An iteration with the arguments of a llama, changed."""
    torch.save({"args": Namespace(**{**LLAMA, **changes}), "iteration": 12}, directory / "common.pt")
    return directory


def configured(directory: Path, provider: str = "gpt_provider.GPTModelProvider", **changes: Any) -> Path:
    """An iteration with Megatron-Bridge's configuration of a llama, changed."""
    model = {
        "_target_": BRIDGE + provider,
        "activation_func": called("torch.nn.functional.silu"),
        "add_bias_linear": False,
        "ffn_hidden_size": 512,
        "gated_linear_unit": True,
        "hidden_size": 256,
        "layernorm_epsilon": 1e-6,
        "normalization": "RMSNorm",
        "num_attention_heads": 8,
        "num_layers": 2,
        "num_query_groups": 4,
        "position_embedding_type": "rope",
        "seq_length": 256,
        "share_embeddings_and_output_weights": False,
        **changes,
    }
    (directory / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    return directory


REFUSED = {
    "apply_residual_connection_post_layernorm": True,
    "hybrid_layer_pattern": "M*M*",
    "moe_a_new_option": 3,
    "moe_router_score_function": "sigmoid",
    "moe_shared_expert_intermediate_size": 64,
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "no_rope_freq": 4,
    "qk_l2_norm": True,
    "quick_geglu": True,
    "rotary_interleaved": True,
    "softmax_scale": 0.1,
    "softmax_type": "learnable",
    "window_attn_skip_freq": 2,
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [saved, configured])
def test_an_option_that_is_not_known_is_refused_by_name(kind: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=rf"{name} .*changes what the model computes, or is not known"):
        read_fields(kind(tmp_path, **{name: REFUSED[name]}))


def test_only_a_training_job_has_options_that_are_passed_over(tmp_path: Path) -> None:
    """What is no option of a training job must be known, whatever its name."""
    assert read_fields(saved(tmp_path, frobnicate=3))["num_layers"] == 2
    with pytest.raises(PtqError, match="frobnicate 3"):
        read_fields(configured(tmp_path, frobnicate=3))


def test_megatrons_defaults_are_accepted(tmp_path: Path) -> None:
    """Every option of the installed megatron-core is one that is read, or asks for nothing by default."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = {"num_layers", "hidden_size", "num_attention_heads", "normalization", "activation_func"}
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TransformerConfig)
        if isinstance(field.default, bool | int | float | str) and field.name not in given
    }
    changed = {"add_bias_linear": False, "gated_linear_unit": True}
    assert read_fields(configured(tmp_path, **{**defaults, **changed}))["num_layers"] == 2


def test_llama_31_scales_its_rotary_embedding(tmp_path: Path) -> None:
    trained = choose_class(read_fields(saved(tmp_path, use_rope_scaling=True, rope_scaling_factor=32.0)), 1024)
    scaling = {"rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000, "kv_channels": 32}
    configuration = choose_class(read_fields(configured(tmp_path, **scaling)), 1024)
    assert trained.nemo_config.endswith(".Llama31Config")
    assert trained.spec == configuration.spec
    assert trained.spec.rotary_scaling == RotaryScaling(32.0, 1.0, 4.0, 8192)


def test_bridge_03_has_a_class_for_llama_31(tmp_path: Path) -> None:
    """Fields as Megatron-Bridge 0.3.0 has written them; other classes have none of these names."""
    scaling = {"scale_factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "old_context_len": 64}
    plain = {"rotary_base": 500000, "kv_channels": 32}
    provider = "llama.llama_provider.Llama31ModelProvider"
    chosen = choose_class(read_fields(configured(tmp_path, provider, **plain, **scaling)), 1024)
    assert chosen.nemo_config.endswith(".Llama31Config")
    assert chosen.spec.rotary_scaling == RotaryScaling(8.0, 1.5, 3.0, 64)
    with pytest.raises(
        PtqError, match=r"high_freq_factor 3\.0, low_freq_factor 1\.5, old_context_len 64, scale_factor 8"
    ):
        read_fields(configured(tmp_path, **plain, **scaling))
    with pytest.raises(PtqError, match="has no old_context_len, as Llama31ModelProvider has"):
        read_fields(configured(tmp_path, provider, **plain, **{**scaling, "old_context_len": None}))


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "LlamaConfig"),
        ({"add_qkv_bias": True}, "Qwen2Config"),
        ({"qk_layernorm": True}, "Qwen3Config"),
        ({"rotary_percent": 0.5}, "Phi3Config"),
        ({"window_size": [127, 0]}, "MistralConfig7B"),
        ({"num_moe_experts": 4, "moe_router_topk": 2}, "MixtralConfig8x7B"),
        ({"num_moe_experts": 4, "qk_layernorm": True}, "Qwen3MoEConfig"),
    ],
)
def test_the_class_is_told_by_what_the_model_computes(changes: dict[str, Any], family: str, tmp_path: Path) -> None:
    chosen = choose_class(read_fields(configured(tmp_path, **changes)), 1024)
    assert chosen.nemo_config.endswith(f".{family}")


def test_gemma_is_told_by_its_provider(tmp_path: Path) -> None:
    gemma = {"activation_func": called("megatron.core.activations.fast_gelu"), "layernorm_zero_centered_gamma": True}
    gemma |= {"share_embeddings_and_output_weights": True}
    chosen = choose_class(read_fields(configured(tmp_path, "gemma.gemma_provider.GemmaModelProvider", **gemma)), 1024)
    assert chosen.nemo_config.endswith(".GemmaConfig")
    plain = choose_class(read_fields(configured(tmp_path, **gemma)), 1024)
    assert plain.nemo_config.endswith(".GPTConfig")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma True"),
        ({"add_qkv_bias": True, "rope_scaling": True, "rope_scaling_factor": 8.0}, "scale_factor 8.0"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type 'yarn'"),
        ({"num_query_groups": 3}, "num_key_value_heads 3"),
    ],
)
def test_a_model_that_no_class_computes_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=said):
        choose_class(read_fields(configured(tmp_path, **changes)), 1024)


def test_a_provider_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match="NemotronHModelProvider', and what that computes is not known"):
        read_fields(configured(tmp_path, "nemotronh.NemotronHModelProvider"))


def test_code_in_the_arguments_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert read_fields(saved(tmp_path, data_path=Pickled(marker)))["hidden_size"] == 256
    assert not marker.exists()


def test_arguments_that_are_missing_are_named(tmp_path: Path) -> None:
    torch.save({"iteration": 3}, tmp_path / "common.pt")
    with pytest.raises(PtqError, match="holds no args"):
        read_fields(tmp_path)
    with pytest.raises(PtqError, match="has no layernorm_epsilon"):
        read_fields(saved(tmp_path, norm_epsilon=None))
    (tmp_path / "common.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(PtqError, match=r"is not a file of torch\.save"):
        read_fields(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": "two"}, "has num_layers 'two': it must be a positive whole number"),
        ({"hidden_size": 256.0}, "has hidden_size '256.0': it must be a positive whole number"),
        ({"num_attention_heads": 0}, "has num_attention_heads '0'"),
        ({"normalization": "Norm"}, "has normalization 'Norm': expected LayerNorm or RMSNorm"),
        ({"window_size": (1, 2, 3)}, r"does not describe a model \(window_size is \(1, 2, 3\)\)"),
    ],
)
def test_what_is_no_size_is_told_by_megatrons_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=said):
        read_fields(saved(tmp_path, **changes))


def iteration(root: Path, number: int, *names: str) -> Path:
    directory = root / f"iter_{number:07}"
    directory.mkdir(parents=True)
    for name in names or (".metadata", "metadata.json", "common.pt"):
        (directory / name).write_text('{"sharded_backend": "torch_dist"}' if name == "metadata.json" else "")
    return directory


def test_the_tracker_says_which_iteration_is_meant(tmp_path: Path) -> None:
    first, second = iteration(tmp_path, 5), iteration(tmp_path, 10)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert is_megatron(tmp_path) and iteration_of(tmp_path) == first
    assert is_megatron(second) and iteration_of(second) == second
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert iteration_of(tmp_path) == second  # as Megatron-Bridge, whose tracker is a pickle


def test_an_iteration_that_is_not_whole_is_told(tmp_path: Path) -> None:
    iteration(tmp_path, 5)
    half = iteration(tmp_path, 10, "common.pt", "__0_0.distcp")
    with pytest.raises(PtqError, match=r"lacks \.metadata, metadata\.json: .* \(found beside it: iter_0000005\)"):
        iteration_of(half)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(PtqError, match="names iteration '7', and found are iter_0000005, iter_0000010"):
        iteration_of(tmp_path)
    with pytest.raises(PtqError, match=r"lacks metadata\.json: it is in fsdp_dtensor or torch_dcp format"):
        iteration_of(iteration(tmp_path, 15, ".metadata", "run_config.yaml"))


def test_the_legacy_format_is_told(tmp_path: Path) -> None:
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(PtqError, match=r"legacy format .*--ckpt-format torch_dist"):
        read_metadata(tmp_path)
    (iteration(tmp_path, 6) / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(PtqError, match="is in format zarr: save it with --ckpt-format torch_dist"):
        read_metadata(tmp_path)


def test_other_directories_are_not_megatrons(tmp_path: Path) -> None:
    assert not is_megatron(tmp_path)
    (tmp_path / "context").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / ".metadata").touch()
    assert not is_megatron(tmp_path) and not is_megatron(tmp_path / "weights")
