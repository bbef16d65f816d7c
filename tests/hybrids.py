# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny Nemotron-H, as its Hugging Face directories are published: not every version of transformers has the class."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.families import SEED, VOCAB, make_tokenizer

PATTERN = "M-M*-M"
# Every block of 128 divides at TP 2, and so do heads and groups.
CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_head_dim": 64,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 0,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 1,
    "expand": 2,
    "hidden_size": 256,
    "hybrid_override_pattern": PATTERN,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 16,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 32,
    "mamba_proj_bias": False,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": len(PATTERN),
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "ssm_state_size": 16,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": VOCAB,
}


def tensors(config: dict[str, Any] = CONFIG) -> dict[str, torch.Tensor]:
    """Returns seeded random weights under the names of published files, bfloat16."""
    generator = torch.Generator().manual_seed(SEED)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, channels = config["mamba_num_heads"], config["mamba_num_heads"] * config["mamba_head_dim"]
    conv = channels + 2 * config["n_groups"] * config["ssm_state_size"]
    head = config["attention_head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def weight(*shape: int, spread: float = 0.06) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul(spread).bfloat16()

    def gain(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul(0.1).add(1.0).bfloat16()

    found = {"backbone.embeddings.weight": weight(config["vocab_size"], hidden), "backbone.norm_f.weight": gain(hidden)}
    for layer, kind in enumerate(config["hybrid_override_pattern"]):
        mixer = f"backbone.layers.{layer}.mixer."
        found[f"backbone.layers.{layer}.norm.weight"] = gain(hidden)
        if kind == "M":
            found |= {
                f"{mixer}A_log": torch.rand(heads, generator=generator).mul(2.7).bfloat16(),
                f"{mixer}D": gain(heads),
                f"{mixer}dt_bias": weight(heads, spread=0.5),
                f"{mixer}conv1d.weight": weight(conv, 1, 4, spread=0.4),
                f"{mixer}conv1d.bias": weight(conv),
                f"{mixer}in_proj.weight": weight(channels + conv + heads, hidden),
                f"{mixer}norm.weight": gain(channels),
                f"{mixer}out_proj.weight": weight(hidden, channels),
            }
        elif kind == "*":
            rows = {"q": queries, "k": keys, "v": keys}
            found |= {f"{mixer}{name}_proj.weight": weight(count, hidden) for name, count in rows.items()}
            found[f"{mixer}o_proj.weight"] = weight(hidden, queries)
        else:
            found[f"{mixer}up_proj.weight"] = weight(inner, hidden)
            found[f"{mixer}down_proj.weight"] = weight(hidden, inner)
    return found | {"lm_head.weight": weight(config["vocab_size"], hidden)}


def make_nemotron_h(directory: Path, **changes: Any) -> Path:
    """Makes the directory; `changes` are settings that differ from :data:`CONFIG`."""
    config = {**CONFIG, **changes}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors(config), directory / "model.safetensors", {"format": "pt"})
    make_tokenizer(directory)
    return directory
