# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""nemo_context/ read without NeMo: the tokenizer's files, and the model's own description against config.json."""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.pretrained import TOKENS_WITHOUT_ROWS, load_pretrained
from nemo_ptq.untrusted import FileError, read_yaml
from nemo_ptq.verify.model_config import Config, RotaryScaling, load_json

# Where a qnemo directory has its context, and where a NeMo checkpoint does.
CONTEXTS = ("nemo_context", "context")

_TOKENIZERS = "nemo.collections.common.tokenizers."
# Tokenizer class -> the key that holds its path.
_PATH_KEYS = {
    _TOKENIZERS + "huggingface.auto_tokenizer.AutoTokenizer": "pretrained_model_name",
    _TOKENIZERS + "sentencepiece_tokenizer.SentencePieceTokenizer": "model_path",
}
# A Hugging Face tokenizer directory needs one of these sets of files.
_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))

# Last component of activation_func's name in model.yaml -> the activations of config.json that compute it.
_ACTIVATIONS = {
    "silu": {"silu", "swiglu", "fast-swiglu"},
    "gelu": {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "openai-gelu", "geglu"},
    "openai_gelu": {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "openai-gelu", "geglu"},
    "squared_relu": {"squared-relu", "relu2"},
    "relu": {"relu"},
}


def context_of(directory: Path) -> Path:
    """Returns the directory of the context; that of a qnemo directory where there is none."""
    return next((directory / name for name in CONTEXTS if (directory / name).is_dir()), directory / CONTEXTS[0])


def read_model_yaml(directory: Path) -> dict[str, Any]:
    """Reads the context's model.yaml as plain data, without running any code it names.

    Raises:
        PtqError: It is missing or no YAML mapping.
    """
    path = context_of(directory) / "model.yaml"
    try:
        raw = read_yaml(path)
    except FileError as error:
        raise PtqError(f"{path.parent.name}/model.yaml {error.reason}") from error
    if not isinstance(raw, dict):
        raise PtqError(f"{path.parent.name}/model.yaml holds no mapping")
    return raw


def tokenizer_path(directory: Path, model_yaml: dict[str, Any]) -> Path:
    """Where the tokenizer's files lie.

    Args:
        directory: The exported directory.
        model_yaml: From :func:`read_model_yaml`.

    Raises:
        PtqError: The tokenizer's class is one that readers without NeMo do not know, or its path is a hub id, leaves
            the directory, or does not exist.
    """
    context = context_of(directory)
    section = model_yaml.get("tokenizer")
    target = section.get("_target_") if isinstance(section, dict) else None
    if not isinstance(section, dict) or target not in _PATH_KEYS:
        raise PtqError(f"tokenizer._target_ is {target!r}, which readers without NeMo cannot restore")
    key = _PATH_KEYS[target]
    value = section.get(key)
    if not isinstance(value, str) or not value:
        raise PtqError(f"tokenizer.{key} is {value!r}, expected a path relative to {context.name}/")
    relative = PurePosixPath(value)
    if relative.is_absolute() or ".." in relative.parts:
        raise PtqError(f"tokenizer.{key} is {value!r}, which does not lie inside {context.name}/")
    path = context / value
    if not path.exists():
        raise PtqError(
            f"tokenizer.{key} is {value!r}, and {context.name}/{value} does not exist: save the tokenizer there"
        )
    return path


def tokenizer_problems(path: Path, config: Config) -> list[str]:
    """What keeps the tokenizer's files from being restored, found by reading them only."""
    if path.is_file():
        return [] if path.stat().st_size else [f"{path.name} is empty"]
    if problems := vocabulary_problems(path):
        return problems
    settings = load_json(path / "tokenizer_config.json")
    if "auto_map" in settings:
        problems.append(f"{path.name}/tokenizer_config.json names code to run (auto_map)")
    if (path / "tokenizer.json").is_file():
        largest = _largest_token(load_json(path / "tokenizer.json"))
        if largest is None:
            problems.append(f"{path.name}/tokenizer.json holds no vocabulary")
        elif largest >= config.vocab_size:
            problems.append(f"{path.name}/tokenizer.json has token {largest}, beyond vocab_size {config.vocab_size}")
    return problems


def vocabulary_problems(path: Path) -> list[str]:
    """What keeps a Hugging Face tokenizer's directory from being loaded, by the names of its files."""
    if any(all((path / name).is_file() for name in names) for names in _VOCABULARIES):
        return []
    names = ", ".join(sorted(item.name for item in path.iterdir()))
    return [f"{path.name}/ holds no vocabulary: needs tokenizer.json, tokenizer.model or vocab.json; found {names}"]


def _largest_token(tokenizer: dict[str, Any]) -> int | None:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    identifiers: list[Any] = []
    if isinstance(vocabulary, dict):
        identifiers += vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram models list (token, score) pairs in the order of their ids.
        identifiers += range(len(vocabulary))
    if isinstance(added, list):
        tokens = (token for token in added if isinstance(token, dict))
        identifiers += [token.get("id") for token in tokens if token.get("content") not in TOKENS_WITHOUT_ROWS]
    return max((item for item in identifiers if isinstance(item, int)), default=None)


def round_trip_problems(path: Path, text: str = "The quick brown fox") -> list[str]:
    """Loads the tokenizer with transformers or sentencepiece, offline and without remote code, and uses it once."""
    if path.is_dir():
        tokenizer = load_pretrained(path)
        decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    else:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(path))
        decoded = processor.decode(processor.encode(text))
    return [] if decoded.strip() == text else [f"{text!r} becomes {decoded!r} when encoded and decoded"]


def config_problems(config: Config, model_yaml: dict[str, Any]) -> list[str]:
    """Where config.json contradicts the model that the context describes.

    Keys that the context lacks, or leaves to be derived (null), are not compared.

    Args:
        config: From config.json.
        model_yaml: From :func:`read_model_yaml`.
    """
    model = model_yaml.get("config")
    if not isinstance(model, dict):
        return ["model.yaml describes no model: config is missing"]
    pairs: list[tuple[str, Any, str]] = [
        ("num_hidden_layers", config.num_hidden_layers, "num_layers"),
        ("hidden_size", config.hidden_size, "hidden_size"),
        ("num_attention_heads", config.num_attention_heads, "num_attention_heads"),
        ("num_key_value_heads", config.num_key_value_heads, "num_query_groups"),
        ("head_size", config.head_size, "kv_channels"),
        ("norm_epsilon", config.norm_epsilon, "layernorm_epsilon"),
        ("max_position_embeddings", config.max_position_embeddings, "seq_length"),
        ("mlp bias", config.mlp_bias, "add_bias_linear"),
    ]
    moe = config.moe
    pairs.append(("moe.num_experts", moe.num_experts if moe else None, "num_moe_experts"))
    if moe:
        pairs.append(("moe.top_k", moe.top_k, "moe_router_topk"))
    inner = "moe_ffn_hidden_size" if moe and model.get("moe_ffn_hidden_size") else "ffn_hidden_size"
    pairs.append(("intermediate_size", config.intermediate_size, inner))
    if config.position_embedding_type == "rope_gpt_neox":
        pairs += [
            *([] if config.local_rotary_base else [("rotary_base", config.rotary_base, "rotary_base")]),
            ("rotary_pct", config.rotary_pct, "rotary_percent"),
        ]
    problems = [
        f"{name} is {value!r}, model.yaml's {key} is {model[key]!r}"
        for name, value, key in pairs
        if (model.get(key) is not None or key == "num_moe_experts") and model.get(key) != value
    ]
    return problems + _derived_problems(config, model)


def _derived_problems(config: Config, model: dict[str, Any]) -> list[str]:
    """Contradictions in what the two files spell differently."""
    problems = []

    def compare(name: str, value: Any, expected: Any, keys: str) -> None:
        if value != expected:
            problems.append(f"{name} is {value!r}, model.yaml's {keys} means {expected!r}")

    if "normalization" in model:
        compare("rmsnorm", config.rmsnorm, model["normalization"] == "RMSNorm", "normalization")
    if "position_embedding_type" in model:
        spelled = {"rope": "rope_gpt_neox"}.get(model["position_embedding_type"], model["position_embedding_type"])
        compare("position_embedding_type", config.position_embedding_type, spelled, "position_embedding_type")
    if "gated_linear_unit" in model and not config.moe:
        compare("a gated MLP", config.gated, model["gated_linear_unit"], "gated_linear_unit")
    if "share_embeddings_and_output_weights" in model:
        tied = model["share_embeddings_and_output_weights"]
        # With several pipeline stages the output layer is always written, so the flag may be down for a tied model.
        if config.mapping.pp_size == 1 or config.share_embedding_table:
            compare("share_embedding_table", config.share_embedding_table, tied, "share_embeddings_and_output_weights")
    if "add_bias_linear" in model:
        biased = bool(model["add_bias_linear"] or model.get("add_qkv_bias"))
        compare("attention bias", config.attention_bias, biased, "add_bias_linear and add_qkv_bias")
    if "qk_layernorm" in model:
        # NeMo's Gemma 3 has no field for it.
        normalises = bool(model["qk_layernorm"] or model.get("interleaved_attn_pattern"))
        compare("a norm of queries and keys", config.qk_norm, normalises, "qk_layernorm")
    if config.post_norms:
        problems += _gemma_problems(config, model)
    if isinstance(model.get("vocab_size"), int) and model["vocab_size"] > config.vocab_size:
        problems.append(f"vocab_size is {config.vocab_size}, model.yaml's vocab_size is {model['vocab_size']}")
    rotary = config.position_embedding_type == "rope_gpt_neox"
    compare("rotary_scaling", config.rotary_scaling, model_scaling(model) if rotary else None, "rotary embedding")
    activation = model.get("activation_func")
    target = activation.get("_target_") if isinstance(activation, dict) else None
    expected = _ACTIVATIONS.get(str(target).rsplit(".", 1)[-1])
    if expected and config.hidden_act not in expected:
        problems.append(f"hidden_act is {config.hidden_act!r}, model.yaml's activation_func is {target}")
    return problems


def _gemma_problems(config: Config, model: dict[str, Any]) -> list[str]:
    """Contradictions in what Gemma 2 and 3 alone have."""
    scalar, pattern = model.get("query_pre_attn_scalar"), model.get("interleaved_attn_pattern")
    scale = model.get("softmax_scale") or config.head_size**-0.5
    expected: dict[str, Any] = {
        "attention_scale": scale if scalar is None else scalar**-0.5,
        "attention_cap": model.get("attn_logit_softcapping"),
        "logit_cap": model.get("final_logit_softcapping"),
    }
    if pattern is not None:
        local_base, base = model["rotary_base"]
        layers = range(sum(pattern) - 1, config.num_hidden_layers, sum(pattern))
        expected |= {"local_rotary_base": local_base, "rotary_base": base}
        expected |= {"attention_window": model["window_size"], "global_layers": frozenset(layers)}
    found = {name: getattr(config, name) for name in expected}
    different = [name for name, value in expected.items() if found[name] != value and not _is_close(found[name], value)]
    return [f"{name} is {found[name]!r}, model.yaml's means {expected[name]!r}" for name in different]


def _is_close(left: Any, right: Any) -> bool:
    return isinstance(left, float) and isinstance(right, float) and math.isclose(left, right, rel_tol=1e-6)


def model_scaling(model: Mapping[str, Any]) -> RotaryScaling | None:
    """The rotary scaling that NeMo's model has: Llama 3.1's four numbers, linear interpolation, or none.

    Args:
        model: The model.yaml's ``config``.
    """
    if model.get("old_context_len") and model.get("scale_factor"):
        return RotaryScaling(
            "llama3",
            model["scale_factor"],
            model.get("low_freq_factor", 1.0),
            model.get("high_freq_factor", 4.0),
            model["old_context_len"],
        )
    if model.get("interleaved_attn_pattern") and model.get("rope_scaling_factor", 1.0) != 1.0:  # of Gemma 3
        return RotaryScaling("linear", model["rope_scaling_factor"])
    if model.get("seq_len_interpolation_factor"):
        return RotaryScaling("linear", model["seq_len_interpolation_factor"])
    return None
