# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Models that are downloaded most, by the settings that they were published with, and what becomes of them.

`NOT_COMPARED` names those whose settings were written from memory, because no copy of the file was at hand.

python -m tests.models.published       writes docs/models.md

Sizes do not matter here, and are made small; what else a config.json says does.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.registry import class_of_architecture, families
from tests.families import VOCAB

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"

Config = Mapping[str, Any]


def _llama(**settings: Any) -> Config:
    common = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
    common |= {"initializer_range": 0.02, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    common |= {"attention_dropout": 0.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "rope_scaling": None}
    return common | {"tie_word_embeddings": False, "num_attention_heads": 32, "num_key_value_heads": 8} | settings


def _llama_of_2023(**settings: Any) -> Config:
    """Settings of a file that is older than some of the class's."""
    later = ("attention_bias", "attention_dropout", "mlp_bias")
    return {name: value for name, value in _llama(**settings).items() if name not in later}


def _llama3_rope(factor: float) -> Config:
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"factor": factor, "rope_type": "llama3", **numbers}


def _qwen(architecture: str, model_type: str, **settings: Any) -> Config:
    common = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "use_cache": True}
    common |= {"initializer_range": 0.02, "attention_dropout": 0.0, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}
    common |= {"rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False}
    return common | {"num_attention_heads": 32, "num_key_value_heads": 8} | settings


_QWEN3 = {"attention_bias": False, "head_dim": 128, "rope_scaling": None, "sliding_window": None, "rope_theta": 1000000}


def _mistral(**settings: Any) -> Config:
    common = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "use_cache": True}
    common |= {"initializer_range": 0.02, "attention_dropout": 0.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
    common |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0, "sliding_window": None}
    return common | {"tie_word_embeddings": False} | settings


def _phi3(**settings: Any) -> Config:
    common = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "use_cache": True}
    common |= {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "pad_token_id": 100257,
    }
    common |= {"initializer_range": 0.02, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "sliding_window": None}
    return common | {"tie_word_embeddings": False} | settings


def _gemma(architecture: str, model_type: str, **settings: Any) -> Config:
    common = {"architectures": [architecture], "model_type": model_type, "hidden_activation": "gelu_pytorch_tanh"}
    common |= {"attention_bias": False, "attention_dropout": 0.0, "cache_implementation": "hybrid", "use_cache": True}
    common |= {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "head_dim": 256}
    return common | {"query_pre_attn_scalar": 256} | settings


_GEMMA2: Config = {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0, "sliding_window": 4096} | {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3: Config = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}

MODELS: Mapping[str, Config] = {
    "meta-llama/Llama-3.1-8B-Instruct": _llama(
        rope_theta=500000.0, rope_scaling=_llama3_rope(8.0), eos_token_id=[128001, 128008, 128009]
    ),
    "meta-llama/Llama-3.2-1B": _llama(
        rope_theta=500000.0, rope_scaling=_llama3_rope(32.0), head_dim=64, tie_word_embeddings=True
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama(rope_theta=500000.0, rope_scaling=_llama3_rope(8.0)),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(rope_theta=10000.0, num_key_value_heads=4),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "is_llama_config": True},
        rope_interleaved=False,
        rope_theta=130000,
        num_key_value_heads=32,
        tie_word_embeddings=True,
    ),
    "tiiuae/Falcon3-7B-Instruct": _llama(
        rope_theta=1000042, head_dim=256, num_attention_heads=12, num_key_value_heads=4, rms_norm_eps=1e-6
    ),
    "meta-llama/Llama-2-7b-chat-hf": _llama_of_2023(num_key_value_heads=32, torch_dtype="float16"),
    "codellama/CodeLlama-7b-Instruct-hf": _llama_of_2023(rope_theta=1000000, num_key_value_heads=32),
    "deepseek-ai/deepseek-coder-1.3b-instruct": _llama(
        rope_scaling={"factor": 4.0, "type": "linear"},
        rope_theta=100000,
        num_attention_heads=16,
        num_key_value_heads=16,
        rms_norm_eps=1e-6,
    ),
    "01-ai/Yi-1.5-9B-Chat": _llama(rope_theta=5000000.0, num_key_value_heads=4, rms_norm_eps=1e-6, pad_token_id=0),
    "lmsys/vicuna-7b-v1.5-16k": _llama_of_2023(
        rope_scaling={"factor": 4.0, "type": "linear"},
        torch_dtype="float16",
        num_key_value_heads=32,
        max_sequence_length=16384,
        pad_token_id=0,
    ),
    "Qwen/Qwen2.5-0.5B": _qwen(
        "Qwen2ForCausalLM",
        "qwen2",
        max_window_layers=24,
        sliding_window=32768,
        use_mrope=False,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct": _qwen(
        "Qwen2ForCausalLM",
        "qwen2",
        max_window_layers=28,
        sliding_window=131072,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen(
        "Qwen2ForCausalLM",
        "qwen2",
        max_window_layers=28,
        sliding_window=4096,
        use_mrope=False,
        rope_theta=10000,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Qwen/Qwen3-0.6B": _qwen(
        "Qwen3ForCausalLM",
        "qwen3",
        **_QWEN3,
        max_window_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": _qwen("Qwen3ForCausalLM", "qwen3", **_QWEN3, max_window_layers=36),
    "Qwen/Qwen3-30B-A3B": _qwen(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        **_QWEN3,
        max_window_layers=48,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        num_key_value_heads=4,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen(
        **{"architecture": "Qwen3ForCausalLM", "model_type": "qwen3", **_QWEN3, "rope_theta": 5000000},
        max_window_layers=36,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _qwen(
        **{"architecture": "Qwen3MoeForCausalLM", "model_type": "qwen3_moe", "head_dim": 128, "rope_theta": 10000000},
        decoder_sparse_step=1,
        max_window_layers=28,
        mlp_only_layers=[],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=128,
        num_experts_per_tok=8,
        num_key_value_heads=4,
        output_router_logits=False,
        qkv_bias=False,
        rope_scaling=None,
        router_aux_loss_coef=0.0,
        shared_expert_intermediate_size=0,
        sliding_window=None,
        use_qk_norm=True,
    ),
    "mistralai/Mistral-7B-v0.1": _mistral(sliding_window=4096, rope_theta=10000.0),
    "mistralai/Mistral-7B-Instruct-v0.3": _mistral(),
    "mistralai/Mistral-Nemo-Instruct-2407": _mistral(head_dim=128),
    "mistralai/Mistral-Small-24B-Instruct-2501": _mistral(head_dim=128, rope_theta=100000000.0),
    "mistralai/Ministral-8B-Instruct-2410": _mistral(head_dim=128, rope_theta=100000000.0, sliding_window=32768),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _mistral(
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=False,
        router_aux_loss_coef=0.02,
    ),
    "google/gemma-2b-it": {
        **{"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu"},
        **{"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "pad_token_id": 0},
        **{"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16"},
        **{"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 1, "use_cache": True},
    },
    "google/gemma-2-2b-it": _gemma(
        "Gemma2ForCausalLM",
        "gemma2",
        **_GEMMA2,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "google/gemma-2-9b-it": _gemma(
        "Gemma2ForCausalLM",
        "gemma2",
        **_GEMMA2,
        sliding_window_size=4096,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "google/gemma-2-27b-it": _gemma(
        "Gemma2ForCausalLM",
        "gemma2",
        **_GEMMA2,
        sliding_window_size=4096,
        head_dim=128,
        query_pre_attn_scalar=144,
        num_attention_heads=32,
        num_key_value_heads=16,
    ),
    "google/gemma-3-270m": _gemma(
        "Gemma3ForCausalLM",
        "gemma3_text",
        **_GEMMA3,
        _sliding_window_pattern=6,
        layer_types=[*["sliding_attention"] * 5, "full_attention"],
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        sliding_window=512,
        rope_scaling=None,
        use_bidirectional_attention=False,
        num_attention_heads=4,
        num_key_value_heads=1,
    ),
    "google/gemma-3-1b-it": _gemma(
        "Gemma3ForCausalLM",
        "gemma3_text",
        **_GEMMA3,
        rope_theta=1000000,
        rope_local_base_freq=10000,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_scaling=None,
        num_attention_heads=4,
        num_key_value_heads=1,
        eos_token_id=[1, 106],
    ),
    "google/gemma-3-4b-it, its language model alone": _gemma(
        "Gemma3ForCausalLM",
        "gemma3_text",
        **_GEMMA3,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        sliding_window=1024,
        sliding_window_pattern=6,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "microsoft/Phi-3-mini-4k-instruct": _phi3(
        **{"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "pad_token_id": 32000},
        original_max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling=None,
        sliding_window=2047,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "microsoft/phi-4": _phi3(
        original_max_position_embeddings=16384,
        rope_theta=250000,
        rope_scaling=None,
        num_attention_heads=40,
        num_key_value_heads=10,
    ),
    "microsoft/Phi-3.5-mini-instruct": _phi3(
        **{"pad_token_id": 32000, "sliding_window": 262144, "rope_theta": 10000.0, "rope_scaling": _LONGROPE},
        original_max_position_embeddings=4096,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "microsoft/Phi-4-mini-instruct": _phi3(
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_theta=10000.0,
        rope_scaling=_LONGROPE,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        mlp_bias=False,
        sliding_window=262144,
    ),
    "bigcode/starcoder2-3b": {
        **{"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh"},
        **{"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1, "use_cache": True},
        **{"initializer_range": 0.018042, "mlp_type": "default", "norm_epsilon": 1e-5, "norm_type": "layer_norm"},
        **{"num_attention_heads": 24, "num_key_value_heads": 2, "rope_theta": 999999.4420358813, "use_bias": True},
        "sliding_window": 4096,
    },
    "Qwen/Qwen2.5-7B-Instruct, with YaRN as its model card says": _qwen(
        "Qwen2ForCausalLM",
        "qwen2",
        max_window_layers=28,
        sliding_window=131072,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "google/gemma-3-4b-it": {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
    "openai-community/gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
    "facebook/opt-125m": {"architectures": ["OPTForCausalLM"], "model_type": "opt"},
    "EleutherAI/pythia-160m": {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"},
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
    },
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"},
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
    },
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
    },
    "HuggingFaceTB/SmolLM3-3B": {
        **{"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layer_interval": 4},
    },
    "openai/gpt-oss-20b": {
        **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"},
    },
    "allenai/OLMo-2-1124-7B-Instruct": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "THUDM/GLM-4-9B-0414": {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"},
    "ibm-granite/granite-3.3-8b-instruct": {
        **{"architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_multiplier": 0.0078125},
        **{"embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22},
    },
    "stabilityai/stablelm-2-1_6b": {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"},
    "deepseek-ai/DeepSeek-V3": {
        **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
    },
}
"""The settings of each model, apart from sizes. Of models that are refused, those that say why."""

NOT_COMPARED = frozenset(
    {
        "01-ai/Yi-1.5-9B-Chat",
        "EleutherAI/pythia-160m",
        "Qwen/Qwen3-4B-Instruct-2507",
        "codellama/CodeLlama-7b-Instruct-hf",
        "deepseek-ai/deepseek-coder-1.3b-instruct",
    }
)
"""Models whose settings were not compared with a published file."""

_SIZES: Config = {
    **{"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
    "max_position_embeddings": 256,
}


def small(config: Config) -> dict[str, Any]:
    """Returns settings with sizes of a model that is made in a moment; windows are shorter than the tests' texts."""
    heads, groups = 8, {1: 1, config["num_attention_heads"]: 8}.get(config["num_key_value_heads"], 4)
    settings = {**config, **_SIZES, "num_attention_heads": heads, "num_key_value_heads": groups}
    if "head_dim" in config:  # of most, it is not the hidden size by the heads
        settings["head_dim"] = 64
    if "num_local_experts" in config:
        settings["num_local_experts"] = 4
    if "num_experts" in config:
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    if config.get("sliding_window") and not config.get("max_window_layers"):
        settings["sliding_window"] = 7
    if pattern := config.get("sliding_window_pattern", config.get("_sliding_window_pattern")):
        settings["num_hidden_layers"] = pattern
    if "pad_token_id" in config:
        settings["pad_token_id"] = 0
    if config.get("rope_scaling") is _LONGROPE:
        count = int(config.get("partial_rotary_factor", 1.0) * 32) // 2
        factors = {"short_factor": [1.0 + number / 8 for number in range(count)], "long_factor": [2.0] * count}
        settings |= {"rope_scaling": _LONGROPE | factors, "original_max_position_embeddings": 64}
    return {**settings, "bos_token_id": 0, "eos_token_id": [1, 2] if "eos_token_id" in config else 1}


def refusal(config: Config) -> str | None:
    """Returns why a job refuses a model, None where it does not."""
    try:
        hf_class = class_of_architecture(config["architectures"][0])
        hf_class.nemo_arguments(hf_class.read(small(config)))
    except PtqError as error:
        return str(error)
    return None


def render() -> str:
    """Returns the document."""
    outcomes = {name: refusal(config) for name, config in MODELS.items()}
    names = {family.hugging_face.architecture: family.name for family in families() if family.hugging_face is not None}
    names["LlamaForCausalLM"] = "Llama"
    runs = [
        f"| {_name(name)} | `{MODELS[name]['architectures'][0]}` | {names[MODELS[name]['architectures'][0]]} |"
        for name, why in outcomes.items()
        if why is None
    ]
    refused = [f"| {_name(name)} | {_cell(why)} |" for name, why in outcomes.items() if why is not None]
    return _TEXT.format(runs="\n".join(runs), refused="\n".join(refused))


def _name(name: str) -> str:
    mark = " (settings not compared with a published file)" if name in NOT_COMPARED else ""
    name, _, more = name.partition(", ")
    return f"`{name}`{more and ', '}{more}{mark}"


def _cell(message: str) -> str:
    """A message of the terminal as a cell of a table, without the list of all classes."""
    return message.partition("; supported: ")[0].replace("|", "\\|").replace("<", "&lt;")


_TEXT = """# Models people use

Some of the most downloaded text models, and whether a job quantizes them. The family names a model's rows in
[the support matrix](support_matrix.md). Other models of these classes work as well, if their config.json has
settings of the same kind.

`python -m tests.models.published` writes this page from the models' settings, except for their sizes.
`tests/models/test_published.py` (`make test-slow`) builds each model small, with random weights, plans a job, runs it,
and compares the export's logits with those of transformers' own class. The models themselves were not run, and
their settings were copied by hand, or written from memory where a row says that they were not compared with a
published file; `nemo-ptq plan` says whether your copy can be quantized.

| model | class | family |
|---|---|---|
{runs}

## Refused

`nemo-ptq plan` and jobs refuse these models before anything starts, with this message:

| model | message |
|---|---|
{refused}

A missing family can be [added in one file](contributing.md), inside or outside the package.
"""


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
    print(json.dumps({name: refusal(config) for name, config in MODELS.items()}, indent=1))
